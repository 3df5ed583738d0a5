// The tensors of a call: results, vectors of channels, scratch memory, and the checks of what was given.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <new>
#include <optional>

#include "memory.hpp"

namespace batchlab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWorthWaiting = 1 << 17;  // bytes; smaller memory comes quickly from the allocator

// Bytes from a tensor's first number to behind its last: more than its numbers where it has gaps.
inline int64_t extent(const Tensor& x) {
  if (x.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  return (last + 1) * x.element_size();
}

inline Tensor empty_as(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t bytes = extent(x);
  if (bytes >= kWorthWaiting) return WaitingMemory::instance().empty(sizes, strides, bytes, x.scalar_type());
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(),
                                                         static_cast<int32_t>(x.scalar_type()),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(int64_t dimensions, const int64_t* sizes, bool wide) {
  AtenTensorHandle handle;
  const int64_t strides[2] = {dimensions == 2 ? std::max<int64_t>(1, sizes[1]) : 1, 1};  // as torch has them
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides,
                                                         static_cast<int32_t>(wide ? ScalarType::Double : ScalarType::Float),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor bytes(int64_t count) {
  const int64_t stride = 1;
  if (count >= kWorthWaiting) return WaitingMemory::instance().empty({&count, 1}, {&stride, 1}, count, ScalarType::Byte);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, static_cast<int32_t>(ScalarType::Byte),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor vector(int64_t channels, bool wide) { return empty(1, &channels, wide); }
inline Tensor vectors(int64_t count, int64_t channels, bool wide) {
  const int64_t sizes[2] = {count, channels};
  return empty(2, sizes, wide);
}

// Memory for the length of one call, last in first out: of each thread its own, and kept, so that a small batch does not
// wait for the allocator seven times.
class Stack {
 public:
  static Stack& of_this_thread() {
    static thread_local Stack stack;
    return stack;
  }
  // Null where there is no room.
  char* push(int64_t bytes) {
    if (top_ + bytes > kBytes) return nullptr;
    char* data = data_ + top_;
    top_ += bytes;
    return data;
  }
  void pop(int64_t bytes) { top_ -= bytes; }
  ~Stack() { ::operator delete[](data_, std::align_val_t(64)); }

 private:
  static constexpr int64_t kBytes = 1 << 18;
  Stack() : data_(new (std::align_val_t(64)) char[kBytes]) {}
  char* data_;
  int64_t top_ = 0;
};

// Numbers for the length of one call.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_((std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64),
        stack_(Stack::of_this_thread()) {
    char* room = stack_.push(bytes_);
    own_ = room == nullptr;
    data_ = reinterpret_cast<A*>(own_ ? new (std::align_val_t(64)) char[bytes_] : room);
  }
  ~Scratch() {
    if (own_)
      ::operator delete[](reinterpret_cast<char*>(data_), std::align_val_t(64));
    else
      stack_.pop(bytes_);
  }
  Scratch(const Scratch&) = delete;
  A* operator+(int64_t offset) const { return data_ + offset; }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t bytes_;
  Stack& stack_;
  bool own_;
  A* data_;
};

template <class A>
const A* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

// Another tensor of x's shape and dtype, with x's strides: copied if it has others.
inline Tensor aligned(const Tensor& x, const Tensor& other, const char* name) {
  bool same = other.dim() == x.dim() && other.scalar_type() == x.scalar_type() && other.is_cpu();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = other.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "batch_norm: ", name, " must have the input's shape, dtype and device");
  for (int64_t d = 0; same && d < x.dim(); ++d) same = other.stride(d) == x.stride(d) || x.size(d) == 1;
  if (same) return other;
  Tensor copy = empty_as(x);
  torch::stable::copy_(copy, other);
  return copy;
}

inline std::optional<Tensor> aligned(const Tensor& x, const std::optional<Tensor>& other, const char* name) {
  return other ? std::optional<Tensor>(aligned(x, *other, name)) : std::nullopt;
}

// What a caller has to see to before; a mistake must not read foreign memory.
inline void check_channels(const Tensor& x, const std::optional<Tensor>& values, const char* name, bool wide) {
  if (!values) return;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == x.size(1) && values->scalar_type() == type &&
                      (values->size(0) < 2 || values->stride(0) == 1),
                  "batch_norm: ", name, " must be a contiguous vector of ", x.size(1), " channels in ",
                  wide ? "float64" : "float32");
}

inline void check_input(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "batch_norm: the input must have channels in dimension 1");
}

inline void check_numbers(const Tensor& numbers, int64_t rows, int64_t channels, bool wide, const char* name) {
  STD_TORCH_CHECK(numbers.dim() == 2 && numbers.size(0) == rows && numbers.size(1) == channels &&
                      (channels < 2 || numbers.stride(1) == 1) && numbers.stride(0) == std::max<int64_t>(1, channels) &&
                      numbers.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "batch_norm: ", name, " must be contiguous (", rows, ", ", channels, ") in ",
                  wide ? "float64" : "float32");
}

// The numbers of a vector of float32 or float64, as double.
inline void copy_numbers(const Tensor& vector, double* to) {
  const auto copy = [&](const auto* from) { std::copy(from, from + vector.numel(), to); };
  if (vector.scalar_type() == ScalarType::Double)
    copy(static_cast<const double*>(vector.const_data_ptr()));
  else
    copy(static_cast<const float*>(vector.const_data_ptr()));
}

}  // namespace batchlab
