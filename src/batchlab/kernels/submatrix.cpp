// Rows and columns of a matrix by index: gather, scatter, and the momentum step, each in one pass over memory.
//
// A weight of any shape is read as rows x columns x inner: a Linear's inner is 1, a convolution's the size of its
// kernel. Kept indices are sorted and distinct, so each row is walked once, from left to right; on AVX-512 sixteen
// neighbours at a time are compressed or expanded by a bit mask, elsewhere element by element.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "memory.hpp"

namespace {

using batchlab::WaitingMemory;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 32768;

// Which of `count` rows or columns take part: all, or the sorted ones in `index`.
struct Kept {
  bool all = true;
  int64_t count = 0;
  const int64_t* index = nullptr;
  int64_t size = 0;

  Kept(const std::optional<Tensor>& given, int64_t count_) : count(count_), size(count_) {
    if (!given) return;
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Long && given->dim() == 1 && given->is_contiguous(),
                    "kept indices are a contiguous int64 vector");
    all = false;
    index = static_cast<const int64_t*>(given->const_data_ptr());
    size = given->numel();
    bool good = size == 0 || (index[0] >= 0 && index[size - 1] < count);
    for (int64_t i = 1; i < size; ++i) good &= index[i] > index[i - 1];  // no early end: many at a time
    if (!good) refuse();
  }
  void refuse() const {
    for (int64_t i = 0; i < size; ++i)
      STD_TORCH_CHECK(index[i] >= 0 && index[i] < count && (i == 0 || index[i] > index[i - 1]),
                      "kept indices are sorted, distinct and below ", count, "; number ", i, " is ", index[i]);
  }
  int64_t operator[](int64_t i) const { return all ? i : index[i]; }
  // From number i to the one after the next, which is to be fetched meanwhile.
  int64_t ahead(int64_t i) const { return (*this)[std::min(i + 2, size - 1)] - (*this)[i]; }
};

// The kept elements of one row of columns x inner.
struct Row {
  int64_t width, size;
  std::vector<int32_t> position;
#ifdef __AVX512F__
  std::vector<uint16_t> mask;
#endif

  Row(const Kept& columns, int64_t inner) : width(columns.count * inner), size(columns.size * inner) {
    position.resize(size);
    int32_t* next = position.data();
    for (int64_t c = 0; c < columns.size; ++c)
      for (int64_t i = 0, start = columns[c] * inner; i < inner; ++i) *next++ = static_cast<int32_t>(start + i);
#ifdef __AVX512F__
    mask.assign((width + 15) / 16, 0);
    uint32_t bits = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t p = position[i];
      bits |= 1u << (p & 15);
      if (i + 1 == size || position[i + 1] >> 4 != p >> 4) {
        mask[p >> 4] = static_cast<uint16_t>(bits);
        bits = 0;
      }
    }
#endif
  }
};

// A contiguous tensor of the dtype of `like`. Blocks and their gradients are as large as layers, and each batch has
// them anew.
Tensor empty(const std::vector<int64_t>& shape, const Tensor& like) {
  int64_t count = 1;
  std::vector<int64_t> strides(shape.size());
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = count;
    count *= shape[d];
  }
  return WaitingMemory::instance().empty(shape, strides, count * like.element_size(), like.scalar_type());
}

struct Momentum {
  double rate, momentum, decay;
  bool nesterov;
};

// Rows that take part lie scattered in memory, where the processor's own prefetching starts anew at each of them: while
// a row is worked on, the one `ahead` elements further is fetched.
template <typename T>
void gather_row(const Row& row, const T* source, T* target, int64_t) {
  for (int64_t i = 0; i < row.size; ++i) target[i] = source[row.position[i]];
}

template <typename T>
void scatter_row(const Row& row, const T* source, T* target) {
  for (int64_t i = 0; i < row.width; ++i) target[i] = T(0);
  for (int64_t i = 0; i < row.size; ++i) target[row.position[i]] = source[i];
}

// g = gradient + decay w;  v = momentum v + g;  w = w - rate (nesterov ? g + momentum v : v)
template <typename T>
void step_row(const Row& row, T* weight, T* velocity, const T* gradient, const Momentum& step, int64_t) {
  const T rate = T(step.rate), momentum = T(step.momentum), decay = T(step.decay);
  for (int64_t i = 0; i < row.size; ++i) {
    const int64_t p = row.position[i];
    const T g = gradient[i] + decay * weight[p];
    T direction = g;
    if (velocity) {
      velocity[p] = momentum * velocity[p] + g;
      direction = step.nesterov ? g + momentum * velocity[p] : velocity[p];
    }
    weight[p] -= rate * direction;
  }
}

#ifdef __AVX512F__
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1u << n) - 1); }

template <>
void gather_row<float>(const Row& row, const float* source, float* target, int64_t ahead) {
  const float* end = target + row.size;
  const int64_t chunks = static_cast<int64_t>(row.mask.size());
  for (int64_t c = 0; c < chunks; ++c) {
    const __mmask16 mask = row.mask[c];
    __builtin_prefetch(source + ahead + 16 * c);
    // Masked-out lanes are never read, so the last chunk may reach over the row's end.
    const __m512 kept = _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, source + 16 * c));
    const int n = __builtin_popcount(mask);
    // What a full store writes beyond the n kept ones is overwritten by the next chunk, except at the end.
    if (target + 16 <= end) _mm512_storeu_ps(target, kept);
    else _mm512_mask_storeu_ps(target, first(n), kept);
    target += n;
  }
}

inline __m512 expand(__mmask16 mask, const float* source, const float* end) {
  return _mm512_maskz_expand_ps(mask, _mm512_maskz_loadu_ps(first(end - source), source));
}

template <>
void scatter_row<float>(const Row& row, const float* source, float* target) {
  const float* end = source + row.size;
  const int64_t chunks = static_cast<int64_t>(row.mask.size());
  for (int64_t c = 0; c < chunks; ++c) {
    _mm512_mask_storeu_ps(target + 16 * c, first(row.width - 16 * c), expand(row.mask[c], source, end));
    source += __builtin_popcount(row.mask[c]);
  }
}

template <>
void step_row<float>(const Row& row, float* weight, float* velocity, const float* gradient, const Momentum& step,
                     int64_t ahead) {
  const float* end = gradient + row.size;
  const __m512 rate = _mm512_set1_ps(static_cast<float>(step.rate));
  const __m512 momentum = _mm512_set1_ps(static_cast<float>(step.momentum));
  const __m512 decay = _mm512_set1_ps(static_cast<float>(step.decay));
  const int64_t chunks = static_cast<int64_t>(row.mask.size());
  for (int64_t c = 0; c < chunks; ++c) {
    const __mmask16 mask = row.mask[c];
    __builtin_prefetch(weight + ahead + 16 * c, 1);
    if (velocity) __builtin_prefetch(velocity + ahead + 16 * c, 1);
    const __m512 w = _mm512_maskz_loadu_ps(mask, weight + 16 * c);
    const __m512 g = _mm512_fmadd_ps(decay, w, expand(mask, gradient, end));
    gradient += __builtin_popcount(mask);
    __m512 direction = g;
    if (velocity) {
      const __m512 v = _mm512_fmadd_ps(momentum, _mm512_maskz_loadu_ps(mask, velocity + 16 * c), g);
      _mm512_mask_storeu_ps(velocity + 16 * c, mask, v);
      direction = step.nesterov ? _mm512_fmadd_ps(momentum, v, g) : v;
    }
    _mm512_mask_storeu_ps(weight + 16 * c, mask, _mm512_fnmadd_ps(rate, direction, w));
  }
}
#endif

struct Shape {
  int64_t rows, columns, inner;
};

Shape shape_of(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() >= 2 && weight.is_contiguous(), "the weight is contiguous, with rows and columns");
  Shape shape{weight.size(0), weight.size(1), 1};
  for (int64_t d = 2; d < weight.dim(); ++d) shape.inner *= weight.size(d);
  STD_TORCH_CHECK(shape.columns * shape.inner < (int64_t{1} << 31), "a row has less than 2^31 elements");
  return shape;
}

void check_block(const Tensor& block, const Tensor& weight, int64_t size) {
  STD_TORCH_CHECK(block.is_contiguous() && block.scalar_type() == weight.scalar_type() && block.numel() == size,
                  "the block is contiguous, of the weight's dtype, with ", size, " elements; got ", block.numel());
}

template <typename F>
void dispatch(const Tensor& weight, const F& body) {
  if (weight.scalar_type() == ScalarType::Float) body(float{});
  else if (weight.scalar_type() == ScalarType::Double) body(double{});
  else STD_TORCH_CHECK(false, "float32 or float64");
}

template <typename F>
void over_rows(int64_t rows, int64_t width, const F& body) {
  const int64_t grain = kElementsPerThread / (width > 0 ? width : 1) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Kept rows `begin` to `begin + count`, of kept columns.
template <typename T>
void gather_rows(const Row& row, const Kept& kept, int64_t begin, int64_t count, const T* source, T* target) {
  over_rows(count, row.width, [&](int64_t i) {
    const T* first = source + kept[begin + i] * row.width;
    gather_row<T>(row, first, target + i * row.size, kept.ahead(begin + i) * row.width);
  });
}

Tensor gather(const Tensor& weight, const std::optional<Tensor>& rows, const std::optional<Tensor>& columns) {
  const Shape shape = shape_of(weight);
  const Kept kept(rows, shape.rows);
  const Kept kept_columns(columns, shape.columns);
  const Row row(kept_columns, shape.inner);
  std::vector<int64_t> sizes{kept.size, kept_columns.size};
  for (int64_t d = 2; d < weight.dim(); ++d) sizes.push_back(weight.size(d));
  Tensor block = empty(sizes, weight);
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    gather_rows<T>(row, kept, 0, kept.size, static_cast<const T*>(weight.const_data_ptr()),
                   static_cast<T*>(block.mutable_data_ptr()));
  });
  return block;
}

Tensor scatter(const Tensor& block, const std::optional<Tensor>& rows, const std::optional<Tensor>& columns,
               int64_t row_count, int64_t column_count, int64_t inner) {
  const Kept kept(rows, row_count);
  const Row row(Kept(columns, column_count), inner);
  STD_TORCH_CHECK(block.is_contiguous() && block.numel() == kept.size * row.size,
                  "the block is contiguous, with ", kept.size * row.size, " elements; got ", block.numel());
  Tensor full = empty({row_count, column_count, inner}, block);
  std::vector<int64_t> block_row(row_count, -1);
  for (int64_t i = 0; i < kept.size; ++i) block_row[kept[i]] = i;
  dispatch(block, [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(block.const_data_ptr());
    T* target = static_cast<T*>(full.mutable_data_ptr());
    over_rows(row_count, row.width, [&](int64_t r) {
      T* out = target + r * row.width;
      if (block_row[r] >= 0) scatter_row<T>(row, source + block_row[r] * row.size, out);
      else std::fill(out, out + row.width, T(0));
    });
  });
  return full;
}

// A gradient that is not there yet: scale left^T right, (samples x rows)^T (samples x columns).
struct Factors {
  const Tensor& left;
  const Tensor& right;
  double scale;
};

Tensor strided(const Tensor& tensor, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               int64_t offset) {
  AtenTensorHandle view;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.begin(), strides.begin(), offset, &view));
  return Tensor(view);
}

void product(const Tensor& out, const Tensor& a, const Tensor& b, double scale) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 0.0, scale));
}

// Rows of a tile that stays in the cache while it is used.
int64_t tile_rows(int64_t row_bytes) {
  constexpr int64_t kTile = 1 << 19;
  return std::max<int64_t>(16, kTile / std::max<int64_t>(1, row_bytes) / 16 * 16);
}

// The gradient of a tile of rows at a time, used while it is in the cache: it never goes to memory.
void step_factors(const Tensor& weight, const std::optional<Tensor>& velocity, const Factors& factors, const Kept& kept,
                  const Row& row, const Momentum& step) {
  const int64_t batch = factors.left.size(0);
  STD_TORCH_CHECK(factors.left.size(1) == kept.size && factors.right.size(1) == row.size &&
                      factors.right.size(0) == batch && factors.left.is_contiguous(),
                  "the gradient's factors are (samples x kept rows) and (samples x kept columns)");
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    const int64_t tile = tile_rows(row.size * sizeof(T));
    const Tensor buffer = empty({std::min(tile, kept.size), row.size}, weight);
    T* w = static_cast<T*>(weight.mutable_data_ptr());
    T* v = velocity ? static_cast<T*>(velocity->mutable_data_ptr()) : nullptr;
    const T* g = static_cast<const T*>(buffer.const_data_ptr());
    for (int64_t begin = 0; begin < kept.size; begin += tile) {
      const int64_t count = std::min(tile, kept.size - begin);
      product(strided(buffer, {count, row.size}, {row.size, 1}, 0),
              strided(factors.left, {count, batch}, {1, kept.size}, begin), factors.right, factors.scale);
      over_rows(count, row.width, [&](int64_t i) {
        const int64_t offset = kept[begin + i] * row.width;
        step_row<T>(row, w + offset, v ? v + offset : nullptr, g + i * row.size, step,
                    kept.ahead(begin + i) * row.width);
      });
    }
  });
}

void step_one(const Tensor& weight, const std::optional<Tensor>& velocity, const Tensor& gradient,
              const std::optional<Tensor>& right, double scale, const std::optional<Tensor>& rows,
              const std::optional<Tensor>& columns, const Momentum& step) {
  // A vector is one row, whose kept entries are its columns.
  const bool vector = weight.dim() == 1;
  const Shape shape = vector ? Shape{1, weight.size(0), 1} : shape_of(weight);
  const Kept kept(vector ? std::nullopt : rows, shape.rows);
  const Row row(Kept(vector ? rows : columns, shape.columns), shape.inner);
  if (velocity) check_block(*velocity, weight, shape.rows * row.width);
  if (right) {
    step_factors(weight, velocity, Factors{gradient, *right, scale}, kept, row, step);
    return;
  }
  check_block(gradient, weight, kept.size * row.size);
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    T* w = static_cast<T*>(weight.mutable_data_ptr());
    T* v = velocity ? static_cast<T*>(velocity->mutable_data_ptr()) : nullptr;
    const T* g = static_cast<const T*>(gradient.const_data_ptr());
    over_rows(kept.size, row.width, [&](int64_t i) {
      const int64_t offset = kept[i] * row.width;
      step_row<T>(row, w + offset, v ? v + offset : nullptr, g + i * row.size, step, kept.ahead(i) * row.width);
    });
  });
}

// All parameters in one call: for small networks the calls would cost more than the steps. Where there is a `right`,
// the gradient is scale gradient^T right.
void momentum_step(std::vector<Tensor> weights, std::vector<Tensor> velocities, std::vector<Tensor> gradients,
                   std::vector<std::optional<Tensor>> right, std::vector<double> scales,
                   std::vector<std::optional<Tensor>> rows, std::vector<std::optional<Tensor>> columns, double rate,
                   double momentum, double decay, bool nesterov) {
  const Momentum step{rate, momentum, decay, nesterov};
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto velocity = velocities.empty() ? std::nullopt : std::optional<Tensor>(velocities[i]);
    step_one(weights[i], velocity, gradients[i], right[i], scales[i], rows[i], columns[i], step);
  }
}

// y = beta y + scale x weight[rows][:, columns]^T, and the block. If nobody needs that afterwards, a tile of rows at a
// time is gathered, into the place of the one before; not fewer rows than make up for reading x anew for each tile.
Tensor add_product(const Tensor& y, const Tensor& input, const Tensor& weight, const Kept& kept, const Kept& columns,
                   double beta, double scale, bool block_needed) {
  const Row row(columns, 1);
  const int64_t batch = input.size(0), width = row.size, element = weight.scalar_type() == ScalarType::Double ? 8 : 4;
  const int64_t tile =
      block_needed ? kept.size : std::min(kept.size, std::max<int64_t>(256, tile_rows(width * element)));
  const Tensor memory = empty({block_needed ? kept.size : tile, width}, weight);
  for (int64_t begin = 0; begin < kept.size; begin += tile) {
    const int64_t count = std::min(tile, kept.size - begin);
    dispatch(weight, [&](auto zero) {
      using T = decltype(zero);
      gather_rows<T>(row, kept, begin, count, static_cast<const T*>(weight.const_data_ptr()),
                     static_cast<T*>(memory.mutable_data_ptr()));
    });
    const Tensor part = strided(y, {batch, count}, {kept.size, 1}, begin);
    const Tensor transposed = strided(memory, {width, count}, {1, width}, 0);
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(part.get(), part.get(), input.get(), transposed.get(), beta, scale));
  }
  return block_needed ? memory : empty({0, width}, weight);
}

// y = relu(scale x block^T + bias[rows]), and the block = weight[rows][:, columns] for the way back, without rows if it
// is not needed there.
std::tuple<Tensor, Tensor> linear_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& rows, const std::optional<Tensor>& columns,
                                          double scale, bool relu, bool block_needed) {
  const Shape shape = shape_of(weight);
  const Kept kept(rows, shape.rows), kept_columns(columns, shape.columns);
  const int64_t batch = input.size(0), count = kept.size;
  STD_TORCH_CHECK(input.dim() == 2 && input.size(1) == kept_columns.size && shape.inner == 1, "the input has ",
                  input.size(1), " features, and the linear layer takes ", kept_columns.size, " of ", shape.columns);
  if (bias) check_block(*bias, weight, weight.size(0));
  Tensor y = empty({batch, count}, weight);
  dispatch(weight, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    if (bias) {
      const T* b = static_cast<const T*>(bias->const_data_ptr());
      if (batch > 0)
        for (int64_t i = 0; i < count; ++i) out[i] = b[kept[i]];
      for (int64_t n = 1; n < batch; ++n) std::copy(out, out + count, out + n * count);
    }
  });
  Tensor block = weight;
  if (rows || columns) {
    block = add_product(y, input, weight, kept, kept_columns, bias ? 1.0 : 0.0, scale, block_needed);
  } else {
    const Tensor transposed = strided(weight, {shape.columns, count}, {1, shape.columns}, 0);
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(y.get(), y.get(), input.get(), transposed.get(), bias ? 1.0 : 0.0, scale));
  }
  if (relu)
    dispatch(weight, [&](auto zero) {
      using T = decltype(zero);
      T* out = static_cast<T*>(y.mutable_data_ptr());
      over_rows(batch, count, [&](int64_t n) {
        // Not max(): NaN stays NaN, as in torch.
        for (int64_t i = n * count; i < (n + 1) * count; ++i) out[i] = out[i] < T(0) ? T(0) : out[i];
      });
    });
  return {y, block};
}

// Gradients of input, block and kept biases, an empty tensor for what is not needed; and the gradient behind the ReLU.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(const Tensor& gradient, const Tensor& input,
                                                           const Tensor& block, const std::optional<Tensor>& output,
                                                           double scale, bool input_needed, bool block_needed,
                                                           bool bias_needed) {
  const int64_t batch = gradient.size(0), count = gradient.size(1), width = block.size(1);
  STD_TORCH_CHECK(gradient.is_contiguous() && gradient.scalar_type() == block.scalar_type(),
                  "the gradient is contiguous, of the weight's dtype");
  Tensor g = gradient;
  Tensor bias_gradient = empty({bias_needed ? count : 0}, block);
  if (output) g = empty({batch, count}, block);
  dispatch(block, [&](auto zero) {
    using T = decltype(zero);
    const T* given = static_cast<const T*>(gradient.const_data_ptr());
    const T* y = output ? static_cast<const T*>(output->const_data_ptr()) : nullptr;
    T* masked = output ? static_cast<T*>(g.mutable_data_ptr()) : nullptr;
    std::vector<double> sum(bias_needed ? count : 0, 0.0);
    for (int64_t n = 0; n < batch; ++n) {
      const T* source = given + n * count;
      if (y) {
        T* target = masked + n * count;
        const T* out = y + n * count;
        for (int64_t i = 0; i < count; ++i) target[i] = out[i] <= T(0) ? T(0) : source[i];
        source = target;
      }
      if (bias_needed)
        for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<double>(source[i]);
    }
    std::copy(sum.begin(), sum.end(), static_cast<T*>(bias_gradient.mutable_data_ptr()));
  });
  Tensor input_gradient = empty({input_needed ? batch : 0, width}, block);
  if (input_needed) product(input_gradient, g, block, scale);
  Tensor block_gradient = empty({block_needed ? count : 0, width}, block);
  if (block_needed) product(block_gradient, strided(g, {count, batch}, {1, count}, 0), input, scale);
  return {input_gradient, block_gradient, bias_gradient, g};
}

int64_t release_memory() { return WaitingMemory::instance().release(); }

// The first `count` entries of a permutation, sorted.
Tensor sorted_first(const Tensor& order, int64_t count) {
  const int64_t n = order.numel();
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Long && order.is_contiguous() && count >= 0 && count <= n,
                  "a contiguous int64 permutation of at least count entries");
  const int64_t* source = static_cast<const int64_t*>(order.const_data_ptr());
  std::vector<uint8_t> chosen(n, 0);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(source[i] >= 0 && source[i] < n, "entries of a permutation are from 0 to ", n - 1);
    chosen[source[i]] = 1;
  }
  AtenTensorHandle handle;
  const int64_t stride = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_int64(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor kept(handle);
  int64_t* target = static_cast<int64_t*>(kept.mutable_data_ptr());
  int64_t found = 0;
  for (int64_t i = 0; i < n && found < count; ++i) {
    target[found] = i;
    found += chosen[i];
  }
  STD_TORCH_CHECK(found == count, "a permutation has every entry once");
  return kept;
}

// Patterns of several dropouts, one after the other from torch's default generator, as torch.randperm would draw them.
std::vector<Tensor> draw(std::vector<int64_t> sizes, std::vector<int64_t> counts) {
  STD_TORCH_CHECK(sizes.size() == counts.size(), "a count for each size");
  std::vector<Tensor> patterns;
  for (size_t i = 0; i < sizes.size(); ++i) {
    int32_t dtype = aoti_torch_dtype_int64();
    AtenTensorHandle order;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_randperm(sizes[i], &dtype, nullptr, nullptr, 0, nullptr, &order));
    patterns.push_back(sorted_first(Tensor(order), counts[i]));
  }
  return patterns;
}

}  // namespace

STABLE_TORCH_LIBRARY(batchlab_submatrix, m) {
  m.def("gather(Tensor weight, Tensor? rows, Tensor? columns) -> Tensor");
  m.def(
      "scatter(Tensor block, Tensor? rows, Tensor? columns, int row_count, int column_count, int inner) -> Tensor");
  m.def(
      "momentum_step(Tensor(a!)[] weights, Tensor(b!)[] velocities, Tensor[] gradients, Tensor?[] right, "
      "float[] scales, Tensor?[] rows, Tensor?[] columns, float rate, float momentum, float decay, bool nesterov) -> ()");
  m.def(
      "linear_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? rows, Tensor? columns, float scale, bool relu, "
      "bool block_needed) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor gradient, Tensor input, Tensor block, Tensor? output, float scale, bool input_needed, "
      "bool block_needed, bool bias_needed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("release_memory() -> int");
  m.def("sorted_first(Tensor order, int count) -> Tensor");
  m.def("draw(int[] sizes, int[] counts) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(batchlab_submatrix, CPU, m) {
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("scatter", TORCH_BOX(&scatter));
  m.impl("momentum_step", TORCH_BOX(&momentum_step));
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("sorted_first", TORCH_BOX(&sorted_first));
}

STABLE_TORCH_LIBRARY_IMPL(batchlab_submatrix, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&release_memory));
  m.impl("draw", TORCH_BOX(&draw));
}
