// From what is known when called to what is known when compiled: types and activations.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "batch_norm_math.hpp"

namespace batchlab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

}  // namespace batchlab
