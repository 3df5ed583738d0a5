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

constexpr int64_t kParameterBytes = 26 << 10;  // of rows that are walked one by one: about half of a first-level cache
constexpr int kTogether = 4;             // neighbouring vectors of a row: memory likes to be read in order

struct Rows {
  int64_t rows, columns;
};

// Some of the rows, and some of the columns: from a multiple of a vector to another one or the last column.
struct Block {
  int64_t first, last, from, to;
  int64_t whole(int width) const { return to / width * width; }
  Block columns(int64_t begin, int64_t end) const { return {first, last, begin, end}; }
};

// How a block is walked: a few columns of some rows, then the next columns, so that their parameters stay in registers;
// or row by row, as memory likes it, but at most some columns of it, so that their parameters stay in the cache.
struct Walk {
  int64_t most_columns = 0;  // of a row, if one by one

  bool one_by_one() const { return most_columns > 0; }
  // Columns to go through together: parts of a row as good as equal, multiples of what is walked at once.
  int64_t part(const Block& block, int64_t together) const {
    const int64_t columns = block.to - block.from;
    if (!one_by_one() || columns <= most_columns) return columns;
    const int64_t parts = (columns + most_columns - 1) / most_columns;
    return ((columns + parts - 1) / parts + together - 1) / together * together;
  }
  // Rows to go through together. If few vectors are a row, all of it is walked at once anyway.
  int64_t group(const Block& block, int64_t together) const {
    const int64_t columns = block.to - block.from;
    if (one_by_one() && columns > together) return 1;
    return std::clamp<int64_t>(kGroupNumbers / columns, 8, kRowsOfFloats);
  }
};

// Sums over a block, column by column: `add(sums, first row, last row, column, vectors)` for some vectors of columns,
// `add_some` with the number of columns for the rest. `one` and `two` have an entry for each column; `scratch` is twice the block's columns,
// rounded up to whole vectors.
template <class A, class Add, class AddSome>
inline void sum_rows(const Block& block, const Walk& walk, double* one, double* two, A* scratch, Add&& add,
                     AddSome&& add_some) {
  constexpr int width = kWidth<A>, together = kTogether * width;
  const int64_t from = block.from, to = block.to, whole = block.whole(width);
  if (const int64_t part = walk.part(block, together); part < to - from) {
    for (int64_t q = from; q < to; q += part)
      sum_rows<A>(block.columns(q, std::min(to, q + part)), walk, one, two, scratch, add, add_some);
    return;
  }
  const int64_t group = walk.group(block, together);
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
    for (; q + together <= whole; q += together)
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
inline void each_row(const Block& block, const Walk& walk, Each&& each, Some&& some) {
  constexpr int width = kWidth<A>, together = kTogether * width;
  if (const int64_t part = walk.part(block, together); part < block.to - block.from) {
    for (int64_t q = block.from; q < block.to; q += part)
      each_row<A>(block.columns(q, std::min(block.to, q + part)), walk, each, some);
    return;
  }
  const int64_t whole = block.whole(width), group = walk.group(block, together);
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
