// Batch norm where neighbouring numbers belong to neighbouring columns: (rows, columns), a channel or a part of one each.
//
// (N, C) and channels-last inputs. Several short rows are read as one long one, so that vectors are full: then a channel
// has several columns. The same for planes too small for a vector: N rows of C · size columns.
#pragma once
#include <algorithm>
#include <type_traits>

#include "batch_norm_math.hpp"

namespace batchlab {

constexpr int64_t kRowsOfFloats = 128;   // that are summed in float before they go into a double
constexpr int64_t kGroupNumbers = 4096;  // of rows that are walked together, to load a column's parameters once for all

constexpr int kTogether = 4;             // neighbouring vectors of a row: memory likes to be read in order

struct Rows {
  int64_t rows, columns;
};

// Some of the rows, and some of the columns: from a multiple of a vector to another one or the last column.
struct Block {
  int64_t first, last, from, to;
  int64_t whole(int width) const { return to / width * width; }
  // Rows that are walked together. If that few vectors are a row, all of it is walked at once anyway.
  int64_t group(bool one_by_one, int width) const {
    if (one_by_one && to - from > kTogether * width) return 1;
    return std::clamp<int64_t>(kGroupNumbers / (to - from), 8, kRowsOfFloats);
  }
};

// Sums over a block, column by column: `add(sums, first row, last row, column, vectors)` for some vectors of columns,
// `add_some` with the number of columns for the rest. `one` and `two` have an entry for each column; `scratch` is twice the block's columns,
// rounded up to whole vectors.
template <class A, class Add, class AddSome>
inline void sum_rows(const Block& block, bool one_by_one, double* one, double* two, A* scratch, Add&& add,
                     AddSome&& add_some) {
  constexpr int width = kWidth<A>;
  const int64_t from = block.from, to = block.to, whole = block.whole(width);
  const int64_t group = block.group(one_by_one, width);
  const int64_t padded = (to - from + width - 1) / width * width;
  A *s1 = scratch - from, *s2 = scratch + padded - from;
  std::fill(scratch, scratch + 2 * padded, A(0));
  int64_t summed = 0;
  const auto flush = [&] {
    for (int64_t q = from; q < to; ++q) {
      one[q] += s1[q];
      two[q] += s2[q];
    }
    std::fill(scratch, scratch + 2 * padded, A(0));
    summed = 0;
  };
  for (int64_t row = block.first; row < block.last;) {
    const int64_t end = std::min(block.last, row + std::min(group, kRowsOfFloats - summed));
    const auto take = [&](int64_t q, auto vectors, auto&& f) {
      Sums<A> s[vectors.value];
#pragma GCC unroll 8
      for (int v = 0; v < vectors.value; ++v)
        s[v] = {Memory<A>::load(s1 + q + v * width), Memory<A>::load(s2 + q + v * width)};
      f(s, vectors);
#pragma GCC unroll 8
      for (int v = 0; v < vectors.value; ++v) {
        Memory<A>::store(s1 + q + v * width, s[v].first);
        Memory<A>::store(s2 + q + v * width, s[v].second);
      }
    };
    const auto full = [&](int64_t q) { return [&, q](Sums<A>* s, auto vectors) { add(s, row, end, q, vectors); }; };
    int64_t q = from;
    for (; q + kTogether * width <= whole; q += kTogether * width)
      take(q, std::integral_constant<int, kTogether>(), full(q));
    for (; q < whole; q += width) take(q, std::integral_constant<int, 1>(), full(q));
    if (whole < to)
      take(whole, std::integral_constant<int, 1>(),
           [&](Sums<A>* s, auto) { add_some(*s, row, end, whole, to - whole); });
    summed += end - row;
    row = end;
    if (summed == kRowsOfFloats) flush();
  }
  if (summed) flush();
}

// each(first row, row after the last, column, vectors) for every vector of a block; some(..., count) for the rest. Backwards,
// and `each` should walk its rows so, too: what was read last for the sums is the likeliest to be in the cache, and a
// processor that reads ahead reads nothing in vain where there is no turning back.
template <class A, class Each, class Some>
inline void each_row(const Block& block, bool one_by_one, Each&& each, Some&& some) {
  constexpr int width = kWidth<A>, together = kTogether * width;
  const int64_t whole = block.whole(width), group = block.group(one_by_one, width);
  for (int64_t end = block.last; end > block.first;) {
    const int64_t row = std::max(block.first, end - group);
    if (whole < block.to) some(row, end, whole, block.to - whole);
    int64_t q = whole;
    for (; (q - block.from) % together != 0; q -= width) each(row, end, q - width, std::integral_constant<int, 1>());
    for (; q > block.from; q -= together) each(row, end, q - together, std::integral_constant<int, kTogether>());
    end = row;
  }
}

}  // namespace batchlab
