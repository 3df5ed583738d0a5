// How the numbers of an input lie in memory: planes of one channel each, or rows of neighbouring columns.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "batch_norm_rows.hpp"
#include "processor.hpp"

namespace batchlab {

using torch::stable::Tensor;

// Outputs of tensors from this size on go past the caches: little of their memory is in them when it is written again,
// for everything else a network does lies between two uses of it, and so it need not be read before it is overwritten.
// In training the processor decides from where on. Forward and backward share memory, and so must agree: what goes past
// the caches is not in them for the other one. In evaluation a layer writes where the one before it has just been.
constexpr int64_t kEvaluationCacheBytes = 5 << 20;

// How a dense tensor lies in memory, and which channel a column belongs to where it lies in rows.
struct Layout {
  bool rows = false;
  int64_t samples = 0, channels = 0, size = 1;  // of planes; rows have `samples` of all positions
  int64_t count = 0;                            // values of each channel
  // Rows of several short ones, and what is left of these.
  Rows main{0, 0}, rest{0, 0};
  int64_t part = 1;  // columns of a channel that are neighbours (planes smaller than a vector)
  int64_t cache_bytes = pays_from().past_caches_bytes;

  int64_t channel(int64_t column) const { return part > 1 ? column / part : column % channels; }
  int64_t numbers() const { return count * channels; }

  // With a residual behind an activation, forward and backward.
  void use_with_residual() {
    if (!rows) cache_bytes = pays_from().past_caches_with_residual_bytes;
  }
};

// Strides of a dense tensor whose channels are innermost; else of a contiguous one. False: neither.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline bool is_contiguous(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

template <class A>
Layout layout_of(const Tensor& x) {
  Layout layout;
  const int64_t inner = x.numel() == 0 ? 1 : x.numel() / (x.size(0) * x.size(1));
  layout.channels = x.size(1);
  layout.count = x.size(0) * inner;
  const bool planes = is_contiguous(x) && inner > 1;
  if (planes && inner >= kWidth<A>) {
    layout.samples = x.size(0);
    layout.size = inner;
    return layout;
  }
  layout.rows = true;
  if (torch::stable::get_num_threads() > 1) layout.cache_bytes = pays_from().rows_of_threads_past_caches_bytes;
  if (planes) {
    layout.part = inner;
    layout.main = {x.size(0), layout.channels * inner};
    return layout;
  }
  // As many rows as fill the vectors that are walked together, or at least each vector, if they are not longer than a
  // page together.
  int64_t several = 1;
  for (const int64_t numbers : {kTogether * kWidth<A>, kWidth<A>}) {
    int64_t rows = 1;
    while (layout.channels * rows % numbers != 0) rows *= 2;
    if (layout.channels * rows > 1024 || layout.count < 8 * rows) continue;
    several = rows;
    break;
  }
  layout.main = {layout.count / several, layout.channels * several};
  layout.rest = {layout.count % several, layout.channels};
  return layout;
}

// Whether outputs go past the caches.
template <class T>
bool beyond_cache(const Layout& layout) {
  return layout.numbers() * static_cast<int64_t>(sizeof(T)) >= layout.cache_bytes;
}

// Processors read ahead of a loop that goes through memory, but not beyond the end of a page. Where a pass is so long
// that memory itself is waited for, loops over rows begin to read this many bytes before they need them.
constexpr int64_t kAheadBytes = 16 << 10;

template <class T>
bool rows_read_ahead(const Layout& layout) {
  return layout.numbers() * static_cast<int64_t>(sizeof(T)) >= pays_from().rows_ahead_bytes;
}
// How rows are walked in a pass that reads and writes `tensors` of them, with some `parameters` of each column.
template <class T, class A>
Walk walk_of_rows(const Layout& layout, int64_t tensors, int64_t parameters) {
  const int64_t bytes = layout.numbers() * tensors * static_cast<int64_t>(sizeof(T));
  if (bytes < pays_from().rows_one_by_one_bytes) return {};
  return {kParameterBytes / (parameters * static_cast<int64_t>(sizeof(A)))};
}
// How far ahead, in numbers: whole rows, so that it is the same columns that are read.
template <class T>
int64_t rows_ahead(const Rows& rows) {
  const int64_t numbers = kAheadBytes / static_cast<int64_t>(sizeof(T));
  return (numbers + rows.columns - 1) / rows.columns * rows.columns;
}

// f(what is so, as a type): its loops are compiled for both.
template <class F>
void with_known(bool so, F&& f) {
  if (so)
    f(std::true_type());
  else
    f(std::false_type());
}

// f(whether outputs go past the caches, whether inputs are read ahead, which they are only then).
template <class F>
void with_known(bool past, bool ahead, F&& f) {
  if (past && ahead)
    f(std::true_type(), std::true_type());
  else
    with_known(past, [&](auto known) { f(known, std::false_type()); });
}

// Columns up to a whole vector.
template <class A>
int64_t padded_columns(const Layout& layout) {
  return (layout.main.columns + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
}

// A number of each of some channels, for each of their columns.
template <class A>
void spread(const Layout& layout, const A* channels, A* columns, int64_t from, int64_t to) {
  const int64_t size = layout.main.columns, padded = padded_columns<A>(layout);
  if (layout.part == 1)
    for (int64_t q = 0; q < size; q += layout.channels) std::copy(channels + from, channels + to, columns + q + from);
  else
    for (int64_t q = from * layout.part; q < to * layout.part; ++q) columns[q] = channels[q / layout.part];
  if (to == layout.channels) std::fill(columns + size, columns + padded, A(0));
}

}  // namespace batchlab
