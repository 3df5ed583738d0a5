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
  int64_t group() const { return std::clamp<int64_t>(kGroupNumbers / (to - from), 8, kRowsOfFloats); }
};

// Sums over a block, column by column: `add(sums, first row, last row, column, vectors)` for some vectors of columns,
// `add_some` with the number of columns for the rest. `one` and `two` have an entry for each column; `scratch` is twice the block's columns,
// rounded up to whole vectors.
template <class A, class Add, class AddSome>
inline void sum_rows(const Block& block, double* one, double* two, A* scratch, Add&& add, AddSome&& add_some) {
  constexpr int width = kWidth<A>;
  const int64_t from = block.from, to = block.to, whole = block.whole(width), group = block.group();
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

// each(first row, row after the last, column, vectors) for every vector of a block; some(..., count) for the rest; backwards.
template <class A, class Each, class Some>
inline void each_row(const Block& block, Each&& each, Some&& some) {
  constexpr int width = kWidth<A>;
  const int64_t whole = block.whole(width), group = block.group();
  for (int64_t end = block.last; end > block.first;) {
    const int64_t row = std::max(block.first, end - group);
    int64_t q = block.from;
    for (; q + kTogether * width <= whole; q += kTogether * width) each(row, end, q, std::integral_constant<int, kTogether>());
    for (; q < whole; q += width) each(row, end, q, std::integral_constant<int, 1>());
    if (whole < block.to) some(row, end, whole, block.to - whole);
    end = row;
  }
}

}  // namespace batchlab
