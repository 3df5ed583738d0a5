// Batch norm, its residual and its activation, forward and backward, in two passes over memory each.
//
// Statistics are sums around a pivot near the mean, float in lanes over few numbers and double beyond, so that a mean
// of 10^4 standard deviations costs no digits. Saved for the backward pass are the input and six numbers a channel: what
// went into the activation is computed again, in the pass that reads the input anyway.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <memory>
#include <optional>
#include <tuple>

#include "batch_norm_planes.hpp"
#include "batch_norm_rows.hpp"
#include "memory.hpp"

namespace {

using namespace batchlab;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNumbersPerThread = 32768;
constexpr int64_t kFewestColumns = 1024;  // of a row at a time: of rows 2^n apart, few fit into a cache's sets
constexpr int kMostLooks = 3;            // a pivot that is bad after two corrections is as good as the numbers allow

// ---- Shapes -------------------------------------------------------------------------------------------------------

// How a dense tensor lies in memory, and which channel a column belongs to where it lies in rows.
struct Layout {
  bool rows = false;
  int64_t samples = 0, channels = 0, size = 1;  // of planes; rows have `samples` of all positions
  int64_t count = 0;                            // values of each channel
  // Rows of several short ones, and what is left of these.
  Rows main{0, 0}, rest{0, 0};
  int64_t part = 1;  // columns of a channel that are neighbours (planes smaller than a vector)

  int64_t channel(int64_t column) const { return part > 1 ? column / part : column % channels; }
  int64_t numbers() const { return count * channels; }
};

// Strides of a dense tensor whose channels are innermost; else of a contiguous one. False: neither.
bool is_channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

bool is_contiguous(const Tensor& x) {
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
  STD_TORCH_CHECK(planes || is_channels_last(x), "batch_norm: the input is neither contiguous nor channels-last");
  if (planes && inner >= kWidth<A>) {
    layout.samples = x.size(0);
    layout.size = inner;
    return layout;
  }
  layout.rows = true;
  if (planes) {
    layout.part = inner;
    layout.main = {x.size(0), layout.channels * inner};
    return layout;
  }
  // As many rows as fill whole vectors, if they are not longer than a page together.
  int64_t several = 1;
  while (several < kWidth<A> && (layout.channels * several) % kWidth<A> != 0) several *= 2;
  if (layout.channels * several > 1024) several = 1;
  layout.main = {layout.count / several, layout.channels * several};
  layout.rest = {layout.count % several, layout.channels};
  return layout;
}

// ---- Memory -------------------------------------------------------------------------------------------------------

constexpr int64_t kWorthWaiting = 1 << 20;  // bytes; smaller memory comes quickly from the allocator

Tensor empty_as(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t bytes = x.numel() * x.element_size();
  if (bytes >= kWorthWaiting) return WaitingMemory::instance().empty(sizes, strides, bytes, x.scalar_type());
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(),
                                                         static_cast<int32_t>(x.scalar_type()),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor vectors(int64_t count, int64_t channels, bool wide) {
  AtenTensorHandle handle;
  const int64_t sizes[2] = {count, channels}, strides[2] = {channels, 1};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      2, sizes, strides, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
      &handle));
  return Tensor(handle);
}

// Numbers for the length of one call.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(new (std::align_val_t(64)) A[std::max<int64_t>(count, 1)]) {}
  ~Scratch() { ::operator delete[](data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  A* operator+(int64_t offset) const { return data_ + offset; }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  A* data_;
};

template <class A>
const A* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

// What a caller has to see to before; a mistake must not read foreign memory.
void check_same(const Tensor& x, const std::optional<Tensor>& other, const char* name) {
  if (!other) return;
  bool same = other->dim() == x.dim() && other->scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d)
    same = other->size(d) == x.size(d) && (other->stride(d) == x.stride(d) || x.size(d) == 1);
  STD_TORCH_CHECK(same, "batch_norm: ", name, " must have the input's shape, dtype and strides");
}

void check_channels(const Tensor& x, const std::optional<Tensor>& values, const char* name, bool wide) {
  if (!values) return;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == x.size(1) && values->scalar_type() == type &&
                      (values->size(0) < 2 || values->stride(0) == 1),
                  "batch_norm: ", name, " must be a contiguous vector of ", x.size(1), " channels in ",
                  wide ? "float64" : "float32");
}

void check_input(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "batch_norm: the input must have channels in dimension 1");
}

// ---- Dispatch -----------------------------------------------------------------------------------------------------

template <class T, class F>
void with_activation(int64_t kind, F&& f) {
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Activation::sigmoid), "batch_norm: there is no activation ",
                  kind);
  const Activation activation = static_cast<Activation>(kind);
  if constexpr (std::is_same_v<T, float>) {
    if (activation == Activation::none) return f(Nothing());
    if (activation == Activation::relu) return f(Relu());
  }
  f(Chosen{activation});
}

template <class F>
auto with_type(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: break;
  }
  STD_TORCH_CHECK(false, "batch_norm: the input must be float32, float64, bfloat16 or float16");
}

inline int64_t grain(const Layout& layout, int64_t units) {
  return std::max<int64_t>(1, units * kNumbersPerThread / std::max<int64_t>(layout.numbers(), 1));
}

// Whether what a pass reads and writes, this many tensors, is more than a last-level cache usually lets one process
// have. (Its size as the system states it may be shared by many.)
constexpr int64_t kCacheBytes = 48 << 20;

template <class T>
bool beyond_cache(const Layout& layout, int64_t tensors) {
  return tensors * layout.numbers() * static_cast<int64_t>(sizeof(T)) >= kCacheBytes;
}

// A cache line that is written past the cache in one part and through it in the other is slower than both.
template <class T>
bool whole_planes(const Layout& layout) {
  return layout.size * sizeof(T) % 64 == 0;
}

template <class F>
void with_past(bool past, F&& f) {
  if (past)
    f(std::true_type());
  else
    f(std::false_type());
}

// A function by reference: what drives the loops is compiled once, and not for each of them.
template <class F>
class Call;
template <class... Arguments>
class Call<void(Arguments...)> {
 public:
  template <class F>
  Call(const F& f)
      : object_(&f), call_([](const void* object, Arguments... a) { (*static_cast<const F*>(object))(a...); }) {}
  void operator()(Arguments... a) const { call_(object_, a...); }

 private:
  const void* object_;
  void (*call_)(const void*, Arguments...);
};
template <class... Arguments>
class Call<bool(Arguments...)> {
 public:
  template <class F>
  Call(const F& f)
      : object_(&f), call_([](const void* object, Arguments... a) { return (*static_cast<const F*>(object))(a...); }) {}
  bool operator()(Arguments... a) const { return call_(object_, a...); }

 private:
  const void* object_;
  bool (*call_)(const void*, Arguments...);
};

// ---- Sums over the batch ------------------------------------------------------------------------------------------

// Two sums a channel, in double; a problem says what is added.
struct Totals {
  Scratch<double> one, two;
  explicit Totals(int64_t channels) : one(channels), two(channels) {
    std::fill_n(one + 0, channels, 0.0);
    std::fill_n(two + 0, channels, 0.0);
  }
};

// A part of the rows: those of several short rows each, or what is left of these.
struct Section {
  Rows rows;
  int64_t origin;  // where it begins
};

inline Section main_rows(const Layout& layout) { return {layout.main, 0}; }
inline Section other_rows(const Layout& layout) { return {layout.rest, layout.main.rows * layout.main.columns}; }

// Sums of blocks of one section into `totals`: each chunk of rows on its own, in an order that does not depend on the
// number of threads.
using SumBlock = Call<void(const Section& section, const Block& block, double* one, double* two, void* scratch)>;
using SettleChannels = Call<bool(int64_t from, int64_t to, const Totals& totals)>;
using FinishBlock = Call<void(const Section& section, const Block& block)>;

template <class A>
void sum_section(const Layout& layout, const Section& section, Totals& totals, SumBlock sum_block) {
  const Rows& r = section.rows;
  if (r.rows == 0) return;
  const int64_t padded = (r.columns + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
  // Each chunk has 16 bytes a column to write and to read: little beside its own rows.
  const int64_t chunks =
      std::clamp<int64_t>(r.rows * r.columns / kNumbersPerThread, 1, std::clamp<int64_t>(r.rows / 128, 1, 64));
  Scratch<double> sums(2 * r.columns * chunks);
  std::fill_n(sums + 0, 2 * r.columns * chunks, 0.0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(2 * padded);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* one = sums + 2 * r.columns * chunk;
      const Block block{r.rows * chunk / chunks, r.rows * (chunk + 1) / chunks, 0, r.columns};
      sum_block(section, block, one, one + r.columns, scratch + 0);
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* one = sums + 2 * r.columns * chunk;
    if (layout.part == 1) {
      for (int64_t q = 0; q < r.columns; q += layout.channels)
        for (int64_t c = 0; c < layout.channels; ++c) {
          totals.one[c] += one[q + c];
          totals.two[c] += one[r.columns + q + c];
        }
    } else {
      for (int64_t q = 0; q < r.columns; ++q) {
        totals.one[q / layout.part] += one[q];
        totals.two[q / layout.part] += one[r.columns + q];
      }
    }
  }
}

template <class A, class T, class Each, class Some>
void each_in_block(const Section& section, const Block& block, const T* output, bool large, Each&& each, Some&& some) {
  const int64_t bytes = kWidth<A> * sizeof(T);
  const auto whole = [&](int64_t numbers) { return numbers * static_cast<int64_t>(sizeof(T)) % bytes == 0; };
  const bool past = large && reinterpret_cast<uintptr_t>(output) % bytes == 0 && whole(section.rows.columns) &&
                    whole(section.origin);
  with_past(past, [&](auto far) {
    each_row<A>(
        block, [&](int64_t row, int64_t last, int64_t q, auto vectors) { each(section, row, last, q, vectors, far); },
        [&](int64_t row, int64_t last, int64_t q, int64_t count) { some(section, row, last, q, count); });
    if (far.value) fence();
  });
}

// Columns that are summed, settled and finished together because all their rows stay in the cache until then; all of
// them if that would be few, or if a channel has several.
inline int64_t columns_together(const Layout& layout, int64_t bytes) {
  const int64_t columns = layout.main.columns;
  if (layout.part > 1 || columns != layout.channels) return columns;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t together = kTileBytes / std::max<int64_t>(1, layout.main.rows * bytes);
  if (threads > 1 && columns >= 256 * threads) together = std::min(together, columns / threads);
  together = together / 64 * 64;
  return together < kFewestColumns ? columns : std::min(together, columns);
}

// Rows: sum, settle each channel, finish. settle(first channel, last channel, totals) is false if those are to be summed
// again.
template <class A>
void in_rows(const Layout& layout, int64_t bytes, SumBlock sum_block, SettleChannels settle, FinishBlock finish) {
  const int64_t columns = layout.main.columns, together = columns_together(layout, bytes);
  Totals totals(layout.channels);
  const auto clear = [&](int64_t from, int64_t to) {
    std::fill(totals.one + from, totals.one + to, 0.0);
    std::fill(totals.two + from, totals.two + to, 0.0);
  };
  if (together < columns) {
    const Section section = main_rows(layout);
    const int64_t tiles = (columns + together - 1) / together;
    torch::stable::parallel_for(0, tiles, grain(layout, tiles), [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(2 * (together + kWidth<A>));
      for (int64_t tile = begin; tile < end; ++tile) {
        const Block block{0, section.rows.rows, tile * together, std::min(columns, (tile + 1) * together)};
        for (int look = 1;; ++look) {
          sum_block(section, block, totals.one + 0, totals.two + 0, scratch + 0);
          if (settle(block.from, block.to, totals) || look == kMostLooks) break;
          clear(block.from, block.to);
        }
        finish(section, block);
      }
    });
    return;
  }
  const Section sections[] = {main_rows(layout), other_rows(layout)};
  for (int look = 1;; ++look) {
    for (const Section& section : sections) sum_section<A>(layout, section, totals, sum_block);
    if (settle(0, layout.channels, totals) || look == kMostLooks) break;
    clear(0, layout.channels);  // again for all: the channels that are in order lose nothing
  }
  for (const Section& section : {sections[1], sections[0]}) {
    if (section.rows.rows == 0) continue;
    torch::stable::parallel_for(0, section.rows.rows, grain(layout, layout.main.rows + layout.rest.rows),
                                [&](int64_t begin, int64_t end) {
                                  finish(section, Block{begin, end, 0, section.rows.columns});
                                });
  }
}

// A number of each of some channels, for each of their columns.
template <class A>
void spread(const Layout& layout, const A* channels, A* columns, int64_t from, int64_t to) {
  const int64_t size = layout.main.columns, padded = (size + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
  if (layout.part == 1)
    for (int64_t q = 0; q < size; q += layout.channels) std::copy(channels + from, channels + to, columns + q + from);
  else
    for (int64_t q = from * layout.part; q < to * layout.part; ++q) columns[q] = channels[q / layout.part];
  if (to == layout.channels) std::fill(columns + size, columns + padded, A(0));
}

template <class A>
int64_t padded_columns(const Layout& layout) {
  return (layout.main.columns + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
}

// ---- Forward ------------------------------------------------------------------------------------------------------

// Numbers of a channel that the backward pass needs: the rows of the tensor `saved`.
enum Saved { kMean, kRest, kInverse, kScale, kShift, kVariance, kSaved };

template <class A>
struct ChannelNumbers {
  A* data;
  int64_t channels;
  A* operator[](int which) const { return data + which * channels; }
};

template <class A>
struct Parameters {
  const A* weight;
  const A* bias;
  double eps;

  // From mean and variance to what is applied, in double.
  void prepare(const ChannelNumbers<A>& numbers, int64_t c, double mean, double rest, double variance) const {
    const double inverse = 1 / std::sqrt(variance + eps);
    const A high = static_cast<A>(mean);
    const double low = (mean - high) + rest;
    const double scale = inverse * (weight ? weight[c] : 1);
    numbers[kMean][c] = high;
    numbers[kRest][c] = static_cast<A>(low);
    numbers[kInverse][c] = static_cast<A>(inverse);
    numbers[kScale][c] = static_cast<A>(scale);
    // x - high is exact or nearly so; what the mean has beyond `high` is taken off behind the scale.
    numbers[kShift][c] = static_cast<A>((bias ? bias[c] : 0) - low * scale);
    numbers[kVariance][c] = static_cast<A>(variance);
  }
};

template <class T>
inline double as_double(T value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
  else if constexpr (std::is_same_v<T, Half>)
    return load_some(&value, 1)[0];
  else
    return value;
}

template <class T>
struct Moments {
  using A = typename Computed<T>::type;
  const T* x;
  const Layout& layout;
  Scratch<A> pivot;

  Moments(const T* x_, const Layout& layout_) : x(x_), layout(layout_), pivot(layout_.channels) {}

  // The mean of some of the first values: near the mean of all, or `settle` finds out that it is not.
  void choose_pivot(int64_t from, int64_t to) {
    if (!layout.rows) {
      const int64_t some = std::min<int64_t>(layout.size, 16);
      for (int64_t c = from; c < to; ++c) {
        A total = 0;
        for (int64_t i = 0; i < some; ++i) total += static_cast<A>(as_double(x[c * layout.size + i]));
        set_pivot(c, total / some);
      }
      return;
    }
    const int64_t some = std::min<int64_t>(layout.count / layout.part, 8);
    const int64_t stride = layout.channels * layout.part;
    for (int64_t c = from; c < to; ++c) pivot[c] = 0;
    for (int64_t row = 0; row < some; ++row)
      for (int64_t c = from; c < to; ++c) pivot[c] += static_cast<A>(as_double(x[row * stride + c * layout.part]));
    for (int64_t c = from; c < to; ++c) set_pivot(c, pivot[c] / some);
  }

  void set_pivot(int64_t c, A value) { pivot[c] = std::isfinite(value) ? value : A(0); }

  void sum_tile(int64_t from, int64_t to, int64_t first, int64_t last, double* one, double* two) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    sum_planes<A>(p, from, to, first, last, one, two, [&](Sums<A>& s, int64_t offset, int lane, int64_t c) {
      Lanes<A> d = Memory<T>::load(x + offset) - all(pivot[c]);
      if (lane) d = from_lane<A>(d, lane);
      s.powers(d);
    });
  }

  // Of some vectors of columns in the rows of a section; `columns` are the pivots.
  template <int vectors>
  void add(Sums<A>* s, const A* columns, const Section& section, int64_t row, int64_t last, int64_t q) const {
    Lanes<A> k[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) k[v] = Memory<A>::load(columns + q + v * kWidth<A>);
    const int64_t width = section.rows.columns;
    const T* from = x + section.origin + q + row * width;
    for (; row < last; ++row, from += width)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) s[v].powers(Memory<T>::load(from + v * kWidth<A>) - k[v]);
  }
  void add_some(Sums<A>& s, const A* columns, const Section& section, int64_t row, int64_t last, int64_t q,
                int64_t count) const {
    const Lanes<A> k = Memory<A>::load(columns + q);
    const int64_t width = section.rows.columns;
    const T* from = x + section.origin + q;
    for (; row < last; ++row) s.powers(load_some(from + row * width, count) - k);
  }

  void sum_block(const A* columns, const Section& section, const Block& block, double* one, double* two,
                 A* scratch) const {
    sum_rows<A>(
        block, one, two, scratch,
        [&](Sums<A>* s, int64_t row, int64_t last, int64_t q, auto vectors) {
          add<vectors.value>(s, columns, section, row, last, q);
        },
        [&](Sums<A>& s, int64_t row, int64_t last, int64_t q, int64_t count) {
          add_some(s, columns, section, row, last, q, count);
        });
  }

  // Mean and variance of a channel from its sums. False: the pivot was too far off, a better one is set.
  bool settle(int64_t c, double one, double two, double eps, double& mean, double& rest, double& variance) {
    const double n = static_cast<double>(layout.count), shift = one / n, from = pivot[c];
    mean = from + shift;
    // What the sum's rounding lost (Knuth's two-sum): in float64 it is all there is beyond the mean.
    const double part = mean - from;
    rest = std::isfinite(mean) ? (from - (mean - part)) + (shift - part) : 0;
    variance = std::max(two / n - shift * shift, 0.0);
    if (two != two) variance = two;
    if (std::isfinite(one) && std::isfinite(two)) {
      if (16 * variance < shift * shift) {
        const A better = static_cast<A>(mean);
        if (better != pivot[c]) {
          pivot[c] = better;
          return false;
        }
      }
      if (variance >= 1e-30 || eps >= 1e-30 || sizeof(A) == 8) return true;
    } else if (!std::isfinite(one) || sizeof(A) == 8) {
      return true;  // inf or NaN in the input
    }
    rest = 0;
    in_double(c, mean, variance);  // squares beyond what float can hold
    return true;
  }

  void in_double(int64_t c, double& mean, double& variance) const {
    const double n = static_cast<double>(layout.count);
    double total = 0, squares = 0;
    each_of(c, [&](double value) { total += value; });
    mean = total / n;
    each_of(c, [&](double value) { squares += (value - mean) * (value - mean); });
    variance = squares / n;
  }

  template <class F>
  void each_of(int64_t c, F&& f) const {
    const int64_t size = layout.rows ? layout.part : layout.size, samples = layout.count / size;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < size; ++i) f(as_double(x[(n * layout.channels + c) * size + i]));
  }
};

template <class T, class Kind, bool has_residual>
struct Apply {
  using A = typename Computed<T>::type;
  Kind kind;
  const T* x;
  const T* residual;
  T* y;

  template <bool past>
  void vector(const Affine<A>& affine, int64_t offset) const {
    Lanes<A> pre = affine(Memory<T>::load(x + offset));
    if constexpr (has_residual) pre += Memory<T>::load(residual + offset);
    put<past>(y + offset, kind.value(pre));
  }
  void some(const Affine<A>& affine, int64_t offset, int64_t count) const {
    Lanes<A> pre = affine(load_some(x + offset, count));
    if constexpr (has_residual) pre += load_some(residual + offset, count);
    store_some(y + offset, kind.value(pre), count);
  }

  void tile(const Layout& layout, const ChannelNumbers<A>& numbers, int64_t from, int64_t to, int64_t first,
            int64_t last) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    with_past(whole_planes<T>(layout) && beyond_cache<T>(layout, has_residual ? 3 : 2), [&](auto past) {
      each_plane<A, past.value>(p, y, from, to, first, last, [&](int64_t c) {
        return [this, affine = Affine<A>{all(numbers[kMean][c]), all(numbers[kScale][c]), all(numbers[kShift][c])}](
                   int64_t offset, auto far) { vector<far.value>(affine, offset); };
      });
    });
  }

  // `columns` are mean, scale and shift of all columns, `padded` apart.
  void block(const Layout& layout, const A* columns, int64_t padded, const Section& section, const Block& of) const {
    const int64_t width = section.rows.columns;
    const auto affine = [&](int64_t q) {
      return Affine<A>{Memory<A>::load(columns + q), Memory<A>::load(columns + padded + q),
                       Memory<A>::load(columns + 2 * padded + q)};
    };
    each_in_block<A>(
        section, of, y, beyond_cache<T>(layout, has_residual ? 3 : 2),
        [&](const Section& s, int64_t row, int64_t last, int64_t q, auto vectors, auto past) {
          Affine<A> a[vectors.value];
#pragma GCC unroll 8
          for (int v = 0; v < vectors.value; ++v) a[v] = affine(q + v * kWidth<A>);
          for (int64_t at = s.origin + row * width + q; row < last; ++row, at += width)
#pragma GCC unroll 8
            for (int v = 0; v < vectors.value; ++v) vector<past.value>(a[v], at + v * kWidth<A>);
        },
        [&](const Section& s, int64_t row, int64_t last, int64_t q, int64_t count) {
          const Affine<A> a = affine(q);
          for (; row < last; ++row) some(a, s.origin + row * width + q, count);
        });
  }
};

// How planes are cut into pieces of work: tiles of channels, and samples too where there are fewer tiles than threads.
struct Cut {
  int64_t tile, tiles, chunks;
  Cut(const Layout& layout, int64_t bytes) {
    const Planes p{layout.samples, layout.channels, layout.size};
    tile = p.tile(bytes);
    const int64_t threads = torch::stable::get_num_threads();
    if (threads > 1) tile = std::min(tile, std::max<int64_t>(1, layout.channels / (2 * threads)));
    tiles = (layout.channels + tile - 1) / tile;
    chunks = 1;
    if (threads > 1 && tiles < 2 * threads && layout.numbers() > 2 * kNumbersPerThread)
      chunks = std::clamp<int64_t>(2 * threads / tiles, 1, layout.samples);
  }
};

// For each tile of planes: sum, settle, apply; settle(channel, one, two) is false if the channel is to be summed again.
using SumTile = Call<void(int64_t from, int64_t to, int64_t first, int64_t last, double* one, double* two)>;
using SettleChannel = Call<bool(int64_t channel, double one, double two)>;
using FinishTile = Call<void(int64_t from, int64_t to, int64_t first, int64_t last)>;

void in_tiles(const Layout& layout, int64_t bytes, SumTile sum_tile, SettleChannel settle, FinishTile finish) {
  const Cut cut(layout, bytes);
  const int64_t channels = layout.channels;
  const auto settle_all = [&](int64_t from, int64_t to, double* one, double* two) {
    for (int64_t c = from; c < to; ++c)
      for (int look = 1; !settle(c, one[c], two[c]) && look < kMostLooks; ++look) {
        one[c] = two[c] = 0;
        sum_tile(c, c + 1, 0, layout.samples, one, two);
      }
  };
  if (cut.chunks == 1) {
    Totals totals(channels);
    torch::stable::parallel_for(0, cut.tiles, grain(layout, cut.tiles), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t from = t * cut.tile, to = std::min(channels, from + cut.tile);
        sum_tile(from, to, 0, layout.samples, totals.one + 0, totals.two + 0);
        settle_all(from, to, totals.one + 0, totals.two + 0);
        finish(from, to, 0, layout.samples);
      }
    });
    return;
  }
  const int64_t pieces = cut.tiles * cut.chunks;
  Scratch<double> sums(2 * channels * cut.chunks);
  std::fill_n(sums + 0, 2 * channels * cut.chunks, 0.0);
  const auto piece = [&](int64_t i, auto&& f) {
    const int64_t chunk = i % cut.chunks, from = i / cut.chunks * cut.tile, to = std::min(channels, from + cut.tile);
    f(chunk, from, to, layout.samples * chunk / cut.chunks, layout.samples * (chunk + 1) / cut.chunks);
  };
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      piece(i, [&](int64_t chunk, int64_t from, int64_t to, int64_t first, int64_t last) {
        double* one = sums + 2 * channels * chunk;
        sum_tile(from, to, first, last, one, one + channels);
      });
  });
  for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
    for (int64_t i = 0; i < 2 * channels; ++i) sums[i] += sums[2 * channels * chunk + i];
  settle_all(0, channels, sums + 0, sums + channels);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      piece(i, [&](int64_t, int64_t from, int64_t to, int64_t first, int64_t last) { finish(from, to, first, last); });
  });
}

template <class T, class A>
void normalize(const Tensor& x, const T* residual, const Tensor& y, const Parameters<A>& parameters,
               const ChannelNumbers<A>& numbers, int64_t activation) {
  const Layout layout = layout_of<A>(x);
  if (layout.numbers() == 0) return;
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(y.mutable_data_ptr());
  Moments<T> moments(from, layout);
  const auto with_apply = [&](auto&& f) {
    with_activation<T>(activation, [&](auto kind) {
      if (residual)
        f(Apply<T, decltype(kind), true>{kind, from, residual, to});
      else
        f(Apply<T, decltype(kind), false>{kind, from, nullptr, to});
    });
  };
  moments.choose_pivot(0, layout.channels);
  const auto settle = [&](int64_t c, double one, double two) {
    double mean, rest, variance;
    const bool settled = moments.settle(c, one, two, parameters.eps, mean, rest, variance);
    parameters.prepare(numbers, c, mean, rest, variance);
    return settled;
  };
  if (layout.rows) {
    const int64_t padded = padded_columns<A>(layout);
    Scratch<A> columns(4 * padded);
    spread(layout, moments.pivot + 0, columns + 0, 0, layout.channels);
    with_apply([&](const auto& apply) {
      in_rows<A>(
          layout, sizeof(T),
          [&](const Section& section, const Block& block, double* one, double* two, void* scratch) {
            moments.sum_block(columns + 0, section, block, one, two, static_cast<A*>(scratch));
          },
          [&](int64_t from, int64_t to, const Totals& totals) {
            bool settled = true;
            for (int64_t c = from; c < to; ++c) settled &= settle(c, totals.one[c], totals.two[c]);
            if (!settled) spread(layout, moments.pivot + 0, columns + 0, from, to);
            for (int i = 1; const int which : {kMean, kScale, kShift})
              spread(layout, numbers[which], columns + padded * i++, from, to);
            return settled;
          },
          [&](const Section& section, const Block& block) {
            apply.block(layout, columns + padded, padded, section, block);
          });
    });
    return;
  }
  with_apply([&](const auto& apply) {
    in_tiles(
        layout, sizeof(T),
        [&](int64_t a, int64_t b, int64_t first, int64_t last, double* one, double* two) {
          moments.sum_tile(a, b, first, last, one, two);
        },
        settle,
        [&](int64_t a, int64_t b, int64_t first, int64_t last) { apply.tile(layout, numbers, a, b, first, last); });
  });
}

template <class A>
void move(const std::optional<Tensor>& running, int64_t channels, double momentum, const A* batch, double factor,
          const A* more) {
  if (!running) return;
  const auto average = [&](auto* values) {
    for (int64_t c = 0; c < channels; ++c) {
      const double value = (static_cast<double>(batch[c]) + (more ? more[c] : 0)) * factor;
      values[c] = static_cast<std::remove_reference_t<decltype(values[0])>>(values[c] + momentum * (value - values[c]));
    }
  };
  if (running->scalar_type() == ScalarType::Double)
    average(static_cast<double*>(running->mutable_data_ptr()));
  else
    average(static_cast<float*>(running->mutable_data_ptr()));
}

// y and the numbers to save. Running statistics move by `momentum`, and the number of batches by one, if they are given.
std::tuple<Tensor, Tensor> forward(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                   std::optional<Tensor> residual, std::optional<Tensor> running_mean,
                                   std::optional<Tensor> running_var, std::optional<Tensor> batches, double momentum,
                                   double eps, int64_t activation) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  check_input(x);
  check_same(x, residual, "residual");
  check_channels(x, weight, "weight", wide);
  check_channels(x, bias, "bias", wide);
  for (const auto* running : {&running_mean, &running_var})
    check_channels(x, *running, "a running statistic", *running && (*running)->scalar_type() == ScalarType::Double);
  STD_TORCH_CHECK(!batches || (batches->numel() == 1 && batches->scalar_type() == ScalarType::Long),
                  "batch_norm: num_batches_tracked must be one int64 number");
  Tensor y = empty_as(x);
  const int64_t channels = x.size(1), count = channels == 0 ? 0 : x.numel() / channels;
  Tensor saved = vectors(kSaved, channels, wide);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    using A = typename Computed<T>::type;
    if (x.numel() == 0) {
      std::fill_n(static_cast<A*>(saved.mutable_data_ptr()), kSaved * channels, A(0));
      return;
    }
    const ChannelNumbers<A> numbers{static_cast<A*>(saved.mutable_data_ptr()), channels};
    const Parameters<A> parameters{data_or_null<A>(weight), data_or_null<A>(bias), eps};
    normalize<T, A>(x, data_or_null<T>(residual), y, parameters, numbers, activation);
    if (count < 2) return;
    move<A>(running_mean, channels, momentum, numbers[kMean], 1.0, numbers[kRest]);
    move<A>(running_var, channels, momentum, numbers[kVariance], static_cast<double>(count) / (count - 1), nullptr);
  });
  if (batches && count >= 2) ++*static_cast<int64_t*>(batches->mutable_data_ptr());
  return {y, saved};
}

// Evaluation: with given statistics, in one pass.
Tensor evaluate(Tensor x, Tensor mean, Tensor variance, std::optional<Tensor> weight, std::optional<Tensor> bias,
                std::optional<Tensor> residual, double eps, int64_t activation) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  check_input(x);
  check_same(x, residual, "residual");
  const std::tuple<const char*, std::optional<Tensor>> vectors_of_channels[] = {
      {"mean", mean}, {"variance", variance}, {"weight", weight}, {"bias", bias}};
  for (const auto& [name, values] : vectors_of_channels) check_channels(x, values, name, wide);
  Tensor y = empty_as(x);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    using A = typename Computed<T>::type;
    const Layout layout = layout_of<A>(x);
    if (layout.numbers() == 0) return;
    Scratch<A> data(kSaved * layout.channels);
    const ChannelNumbers<A> numbers{data + 0, layout.channels};
    const Parameters<A> parameters{data_or_null<A>(weight), data_or_null<A>(bias), eps};
    const A* m = static_cast<const A*>(mean.const_data_ptr());
    const A* v = static_cast<const A*>(variance.const_data_ptr());
    for (int64_t c = 0; c < layout.channels; ++c) parameters.prepare(numbers, c, m[c], 0, v[c]);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T* of_residual = data_or_null<T>(residual);
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const auto run = [&](const auto& apply) {
      if (!layout.rows) {
        const Cut cut(layout, sizeof(T));
        const int64_t pieces = layout.samples * cut.tiles;
        torch::stable::parallel_for(0, pieces, grain(layout, pieces), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / cut.tiles, a = i % cut.tiles * cut.tile;
            apply.tile(layout, numbers, a, std::min(layout.channels, a + cut.tile), n, n + 1);
          }
        });
        return;
      }
      const int64_t padded = padded_columns<A>(layout);
      Scratch<A> columns(3 * padded);
      for (int i = 0; const int which : {kMean, kScale, kShift})
        spread(layout, numbers[which], columns + padded * i++, 0, layout.channels);
      for (const Section& section : {main_rows(layout), other_rows(layout)}) {
        if (section.rows.rows == 0) continue;
        torch::stable::parallel_for(0, section.rows.rows, grain(layout, layout.main.rows + layout.rest.rows),
                                    [&](int64_t begin, int64_t end) {
                                      apply.block(layout, columns + 0, padded, section,
                                                  Block{begin, end, 0, section.rows.columns});
                                    });
      }
    };
    with_activation<T>(activation, [&](auto kind) {
      if (of_residual)
        run(Apply<T, decltype(kind), true>{kind, from, of_residual, to});
      else
        run(Apply<T, decltype(kind), false>{kind, from, nullptr, to});
    });
  });
  return y;
}

// ---- Backward -----------------------------------------------------------------------------------------------------

template <class T, class Kind, Source source>
struct Gradient {
  using A = typename Computed<T>::type;
  Kind kind;
  const T* gradient;
  const T* x;
  const T* other;  // the output or the residual, where the source needs it

  template <class Load>
  Lanes<A> operator()(Load&& load, const Affine<A>& affine, Lanes<A> value) const {
    const Lanes<A> g = load(gradient);
    if constexpr (source == Source::output) return kind.before_output(g, load(other));
    Lanes<A> pre = affine(value);
    if constexpr (source == Source::input_and_residual) pre += load(other);
    return kind.before(g, pre);
  }
};

template <class T, class Kind, Source source>
struct Backward {
  using A = typename Computed<T>::type;
  Gradient<T, Kind, source> before;
  T* input_gradient;
  T* residual_gradient;  // or null
  ChannelNumbers<A> saved;
  ChannelNumbers<A> factors;  // a, b, c of InputGradient

  Affine<A> affine(int64_t c) const { return {all(saved[kMean][c]), all(saved[kScale][c]), all(saved[kShift][c])}; }

  bool far(const Layout& layout) const {
    return beyond_cache<T>(layout, 3 + (before.other != nullptr) + (residual_gradient != nullptr));
  }

  template <bool past>
  void vector(const Affine<A>& a, const InputGradient<A>& change, int64_t offset) const {
    const auto load = [&](const T* of) { return Memory<T>::load(of + offset); };
    const Lanes<A> value = load(before.x), g = before(load, a, value);
    put<past>(input_gradient + offset, change(g, value));
    // Its memory begins at a multiple of a vector where that of the other gradient does: both come from `empty_as`.
    if (residual_gradient) put<past>(residual_gradient + offset, g);
  }

  void sum_tile(const Layout& layout, int64_t from, int64_t to, int64_t first, int64_t last, double* one,
                double* two) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    sum_planes<A>(p, from, to, first, last, one, two, [&](Sums<A>& s, int64_t offset, int lane, int64_t c) {
      const auto load = [&](const T* of) { return Memory<T>::load(of + offset); };
      const Affine<A> a = affine(c);
      const Lanes<A> value = load(before.x);
      Lanes<A> g = before(load, a, value), d = value - a.mean;
      if (lane) g = from_lane<A>(g, lane), d = from_lane<A>(d, lane);
      s.products(g, d);
    });
  }

  void finish_tile(const Layout& layout, int64_t from, int64_t to, int64_t first, int64_t last) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    with_past(whole_planes<T>(layout) && far(layout), [&](auto past) {
      each_plane<A, past.value>(p, input_gradient, from, to, first, last, [&](int64_t c) {
        return [this, a = affine(c),
                change = InputGradient<A>{all(saved[kMean][c]), all(saved[kInverse][c]), all(factors[0][c]),
                                          all(factors[1][c]), all(factors[2][c])}](int64_t offset, auto past) {
          vector<past.value>(a, change, offset);
        };
      });
    });
  }

  // Parameters of columns: mean, scale, shift, inverse, a, b, c; `padded` apart.
  struct Columns {
    const A* data;
    int64_t padded;
    Lanes<A> operator()(int which, int64_t q) const { return Memory<A>::load(data + which * padded + q); }
    Affine<A> affine(int64_t q) const { return {(*this)(0, q), (*this)(1, q), (*this)(2, q)}; }
    InputGradient<A> change(int64_t q) const {
      return {(*this)(0, q), (*this)(3, q), (*this)(4, q), (*this)(5, q), (*this)(6, q)};
    }
  };
  static constexpr int kColumnNumbers = 7;

  template <int vectors>
  void add(Sums<A>* s, const Columns& columns, const Section& section, int64_t row, int64_t last, int64_t q) const {
    Affine<A> a[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) a[v] = columns.affine(q + v * kWidth<A>);
    for (int64_t at = section.origin + row * section.rows.columns + q; row < last; ++row, at += section.rows.columns)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const auto load = [&](const T* of) { return Memory<T>::load(of + at + v * kWidth<A>); };
        const Lanes<A> value = load(before.x);
        s[v].products(before(load, a[v], value), value - a[v].mean);
      }
  }

  void add_some(Sums<A>& s, const Columns& columns, const Section& section, int64_t row, int64_t last, int64_t q,
                int64_t count) const {
    const Affine<A> a = columns.affine(q);
    for (; row < last; ++row) {
      const auto load = [&](const T* of) {
        return load_some(of + section.origin + row * section.rows.columns + q, count);
      };
      const Lanes<A> value = load(before.x);
      s.products(before(load, a, value), value - a.mean);
    }
  }

  void sum_block(const Columns& columns, const Section& section, const Block& block, double* one, double* two,
                 A* scratch) const {
    sum_rows<A>(
        block, one, two, scratch,
        [&](Sums<A>* s, int64_t row, int64_t last, int64_t q, auto vectors) {
          add<vectors.value>(s, columns, section, row, last, q);
        },
        [&](Sums<A>& s, int64_t row, int64_t last, int64_t q, int64_t count) {
          add_some(s, columns, section, row, last, q, count);
        });
  }

  void block(const Layout& layout, const Columns& columns, const Section& section, const Block& of) const {
    const int64_t width = section.rows.columns;
    each_in_block<A>(
        section, of, input_gradient, far(layout),
        [&](const Section& s, int64_t row, int64_t last, int64_t q, auto vectors, auto past) {
          Affine<A> a[vectors.value];
          InputGradient<A> f[vectors.value];
#pragma GCC unroll 8
          for (int v = 0; v < vectors.value; ++v) {
            a[v] = columns.affine(q + v * kWidth<A>);
            f[v] = columns.change(q + v * kWidth<A>);
          }
          for (int64_t at = s.origin + row * width + q; row < last; ++row, at += width)
#pragma GCC unroll 8
            for (int v = 0; v < vectors.value; ++v) vector<past.value>(a[v], f[v], at + v * kWidth<A>);
        },
        [&](const Section& s, int64_t row, int64_t last, int64_t q, int64_t count) {
          const Affine<A> a = columns.affine(q);
          const InputGradient<A> f = columns.change(q);
          for (; row < last; ++row) {
            const int64_t offset = s.origin + row * width + q;
            const auto load = [&](const T* of) { return load_some(of + offset, count); };
            const Lanes<A> value = load(before.x), g = before(load, a, value);
            store_some(input_gradient + offset, f(g, value), count);
            if (residual_gradient) store_some(residual_gradient + offset, g, count);
          }
        });
  }

  // Σ g and Σ g (x - mean) of a channel to the factors, with the means over `count` values.
  void prepare(int64_t c, double one, double two, double count, double& centered) const {
    const double inverse = saved[kInverse][c], rest = saved[kRest][c], a = saved[kScale][c];
    centered = (two - rest * one) * inverse;  // Σ g x̂
    const double b = -a * centered / count;
    factors[0][c] = static_cast<A>(a);
    factors[1][c] = static_cast<A>(b);
    factors[2][c] = static_cast<A>(-a * one / count - b * rest * inverse);
  }
};

// Gradients of input, residual (empty where it is not needed, or is `gradient` itself), weight and bias.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor gradient, Tensor x, std::optional<Tensor> output,
                                            std::optional<Tensor> residual, Tensor saved, int64_t activation,
                                            bool residual_needed) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  check_input(x);
  check_same(x, gradient, "gradient");
  check_same(x, output, "output");
  check_same(x, residual, "residual");
  STD_TORCH_CHECK(saved.dim() == 2 && saved.size(0) == kSaved && saved.size(1) == x.size(1) && saved.stride(1) == 1 &&
                      saved.stride(0) == x.size(1) &&
                      saved.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "batch_norm: saved must be what forward returned");
  Tensor input_gradient = empty_as(x);
  const int64_t channels = x.size(1);
  Tensor parameters = vectors(2, channels, wide);
  const bool own = residual_needed && activation != 0;
  Tensor residual_gradient = own ? empty_as(x) : vectors(0, 0, wide);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    using A = typename Computed<T>::type;
    const Layout layout = layout_of<A>(x);
    A* of_parameters = static_cast<A*>(parameters.mutable_data_ptr());
    if (layout.numbers() == 0) {
      std::fill_n(of_parameters, 2 * channels, A(0));
      return;
    }
    Scratch<A> factors(3 * channels);
    const double count = static_cast<double>(layout.count);
    const auto run = [&](auto problem) {
      const auto settle = [&](int64_t c, double one, double two) {
        double centered;
        problem.prepare(c, one, two, count, centered);
        of_parameters[c] = static_cast<A>(centered);
        of_parameters[channels + c] = static_cast<A>(one);
        return true;
      };
      using Problem = decltype(problem);
      if (layout.rows) {
        const int64_t padded = padded_columns<A>(layout);
        Scratch<A> data(Problem::kColumnNumbers * padded);
        const typename Problem::Columns columns{data + 0, padded};
        int i = 0;
        for (const int which : {kMean, kScale, kShift, kInverse})
          spread(layout, problem.saved[which], data + padded * i++, 0, channels);
        in_rows<A>(
            layout, 2 * sizeof(T),
            [&](const Section& section, const Block& block, double* one, double* two, void* scratch) {
              problem.sum_block(columns, section, block, one, two, static_cast<A*>(scratch));
            },
            [&](int64_t from, int64_t to, const Totals& totals) {
              for (int64_t c = from; c < to; ++c) settle(c, totals.one[c], totals.two[c]);
              for (int which = 0; which < 3; ++which)
                spread(layout, problem.factors[which], data + padded * (4 + which), from, to);
              return true;
            },
            [&](const Section& section, const Block& block) { problem.block(layout, columns, section, block); });
        return;
      }
      in_tiles(
          layout, 2 * sizeof(T),
          [&](int64_t a, int64_t b, int64_t first, int64_t last, double* one, double* two) {
            problem.sum_tile(layout, a, b, first, last, one, two);
          },
          settle,
          [&](int64_t a, int64_t b, int64_t first, int64_t last) { problem.finish_tile(layout, a, b, first, last); });
    };
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T* behind = static_cast<const T*>(gradient.const_data_ptr());
    const ChannelNumbers<A> numbers{static_cast<A*>(saved.mutable_data_ptr()), channels};
    const ChannelNumbers<A> of_input{factors + 0, channels};
    T* to = static_cast<T*>(input_gradient.mutable_data_ptr());
    T* to_residual = own ? static_cast<T*>(residual_gradient.mutable_data_ptr()) : nullptr;
    with_activation<T>(activation, [&](auto kind) {
      using Kind = decltype(kind);
      const auto go = [&](auto source, const T* other) {
        constexpr Source s = decltype(source)::value;
        run(Backward<T, Kind, s>{{kind, behind, from, other}, to, to_residual, numbers, of_input});
      };
      if constexpr (!std::is_same_v<Kind, Nothing>)
        if (output) return go(std::integral_constant<Source, Source::output>{}, data_or_null<T>(output));
      if constexpr (std::is_same_v<Kind, Chosen>)
        if (residual) return go(std::integral_constant<Source, Source::input_and_residual>{}, data_or_null<T>(residual));
      constexpr bool any = std::is_same_v<Kind, Nothing>;
      STD_TORCH_CHECK(any || !residual, "batch_norm: a ReLU's gradient needs the output");
      go(std::integral_constant<Source, Source::input>{}, nullptr);
    });
  });
  return {input_gradient, residual_gradient, parameters};
}

int64_t release_memory() { return WaitingMemory::instance().release(); }

}  // namespace

STABLE_TORCH_LIBRARY(batchlab_batch_norm, m) {
  m.def(
      "forward_(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float momentum, float eps, int activation) -> "
      "(Tensor, Tensor)");
  m.def(
      "evaluate(Tensor x, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "int activation) -> Tensor");
  m.def("release_memory() -> int");
  m.def(
      "backward(Tensor gradient, Tensor x, Tensor? output, Tensor? residual, Tensor saved, int activation, "
      "bool residual_needed) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(batchlab_batch_norm, CPU, m) {
  m.impl("forward_", TORCH_BOX(&forward));
  m.impl("evaluate", TORCH_BOX(&evaluate));
  m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(batchlab_batch_norm, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&release_memory));
}
