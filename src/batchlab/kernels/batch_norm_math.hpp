// What batch norm does to one vector of numbers; `Lanes` may be of one channel or of neighbouring ones.
#pragma once
#include <type_traits>

#include "vector.hpp"

namespace batchlab {

enum class Activation : int64_t { none, relu, leaky_relu, silu, sigmoid };
template <class V>
constexpr auto slope = static_cast<std::decay_t<decltype(V{}[0])>>(0.01);  // of leaky_relu, as in torch.nn.functional

template <class V>
inline V sigmoid(V x) {
  return 1 / (1 + exponential(-x));
}

template <Activation kind, class V>
inline V activate(V x) {
  const V zero = {};
  if constexpr (kind == Activation::relu) return x <= zero ? zero : x;  // this way round NaN stays NaN
  if constexpr (kind == Activation::leaky_relu) return x > zero ? x : x * slope<V>;
  if constexpr (kind == Activation::silu) return x * sigmoid(x);
  if constexpr (kind == Activation::sigmoid) return sigmoid(x);
  return x;
}

// The gradient before the activation, from the one behind it and what went in.
template <Activation kind, class V>
inline V before(V gradient, V x) {
  const V zero = {};
  if constexpr (kind == Activation::relu) return x <= zero ? zero : gradient;
  if constexpr (kind == Activation::leaky_relu) return x > zero ? gradient : gradient * slope<V>;
  if constexpr (kind == Activation::silu) {
    const V s = sigmoid(x);
    return gradient * (s * (1 + x * (1 - s)));
  }
  if constexpr (kind == Activation::sigmoid) {
    const V s = sigmoid(x);
    return gradient * (s * (1 - s));
  }
  return gradient;
}

// The same from what came out: a (leaky) ReLU keeps the sign, and y (1 - y) is the sigmoid's derivative.
template <Activation kind, class V>
inline V before_output(V gradient, V y) {
  if constexpr (kind == Activation::sigmoid) return gradient * (y * (1 - y));
  return before<kind>(gradient, y);
}

// What the gradient before the activation is found from.
enum class Source { input, output, input_and_residual };

// Forward: y = act((x - mean) scale + shift + residual).
template <class A>
struct Affine {
  Lanes<A> mean, scale, shift;
  Lanes<A> operator()(Lanes<A> x) const { return (x - mean) * scale + shift; }
};

// Backward: dx = a g + x̂ b + c, x̂ = (x - mean) / √(var + eps).
template <class A>
struct InputGradient {
  Lanes<A> mean, inverse, a, b, c;
  Lanes<A> operator()(Lanes<A> g, Lanes<A> x) const { return a * g + ((x - mean) * inverse * b + c); }
};

// First and second sums of a vector's worth of channels, or of one channel's lanes.
template <class A>
struct Sums {
  Lanes<A> first = {}, second = {};
  // Of values d.
  void powers(Lanes<A> d) {
    first += d;
    second += d * d;
  }
  // Of gradients g, and of their products with d.
  void products(Lanes<A> g, Lanes<A> d) {
    first += g;
    second += g * d;
  }
  Sums& operator+=(const Sums& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

}  // namespace batchlab
