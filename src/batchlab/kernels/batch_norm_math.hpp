// What batch norm does to one vector of numbers; `Lanes` may be of one channel or of neighbouring ones.
#pragma once
#include <type_traits>

#include "vector.hpp"

namespace batchlab {

enum class Activation : int64_t { none, relu, leaky_relu, silu, sigmoid };
inline bool is_relu(int64_t activation) { return activation == 1 || activation == 2; }  // or a leaky one
template <class V>
constexpr auto slope = static_cast<std::decay_t<decltype(V{}[0])>>(0.01);  // of leaky_relu, as in torch.nn.functional

// Activations as types, where they are compiled into the loops; all others go through `Chosen`, a branch a vector, so
// that the loops are compiled once for them all.
struct Nothing {
  template <class V>
  V value(V x) const {
    return x;
  }
  template <class V>
  V before(V gradient, V) const {
    return gradient;
  }
  template <class V>
  V before_output(V gradient, V) const {
    return gradient;
  }
};

struct Relu {
  template <class V>
  V value(V x) const {
    const V zero = {};
    return x <= zero ? zero : x;  // this way round NaN stays NaN
  }
  // The gradient before the activation, from the one behind it and what went in.
  template <class V>
  V before(V gradient, V x) const {
    const V zero = {};
    return x <= zero ? zero : gradient;
  }
  // The same from what came out.
  template <class V>
  V before_output(V gradient, V y) const {
    return before(gradient, y);
  }
  // Where it lets the gradient through, a bit a lane, and the gradient before it by that.
  template <class V>
  uint32_t passes(V y) const {
    return bits_above_zero<true>(y);
  }
  template <class V>
  V before_mask(V gradient, uint32_t passes) const {
    return choose(passes, gradient, V{});
  }
};

// In line, long as it is: then the exponentials of neighbouring vectors are computed side by side.
template <class V>
inline V sigmoid(V x) {
  return 1 / (1 + exponential(-x));
}

struct Chosen {
  Activation which;
  // Whether it takes longer than to read a number.
  bool is_long() const { return which == Activation::silu || which == Activation::sigmoid; }
  template <class V>
  V value(V x) const {
    const V zero = {};
    switch (which) {
      case Activation::relu: return Relu().value(x);
      case Activation::leaky_relu: return x > zero ? x : x * slope<V>;
      case Activation::silu: return x * sigmoid(x);
      case Activation::sigmoid: return sigmoid(x);
      default: return x;
    }
  }
  template <class V>
  V before(V gradient, V x) const {
    const V zero = {};
    switch (which) {
      case Activation::relu: return Relu().before(gradient, x);
      case Activation::leaky_relu: return x > zero ? gradient : gradient * slope<V>;
      case Activation::silu: {
        const V s = sigmoid(x);
        return gradient * (s * (1 + x * (1 - s)));
      }
      case Activation::sigmoid: {
        const V s = sigmoid(x);
        return gradient * (s * (1 - s));
      }
      default: return gradient;
    }
  }
  // A (leaky) ReLU keeps the sign, and y (1 - y) is the sigmoid's derivative.
  template <class V>
  V before_output(V gradient, V y) const {
    return which == Activation::sigmoid ? gradient * (y * (1 - y)) : before(gradient, y);
  }
  // Of a (leaky) ReLU.
  template <class V>
  uint32_t passes(V y) const {
    return which == Activation::relu ? Relu().passes(y) : bits_above_zero<false>(y);
  }
  template <class V>
  V before_mask(V gradient, uint32_t passes) const {
    return which == Activation::relu ? Relu().before_mask(gradient, passes) : choose(passes, gradient, gradient * slope<V>);
  }
};

// What the gradient before the activation is found from.
enum class Source { input, output, mask, input_and_residual };

// Forward: y = act((x - mean) scale + shift + residual).
template <class A>
struct Affine {
  Lanes<A> mean, scale, shift;
  Lanes<A> operator()(Lanes<A> x) const { return (x - mean) * scale + shift; }
};

// Backward: dx = scale g + (x - mean) b + c, with b = -scale Σ g x̂ / (n √(var + eps)) and c = -scale Σ g / n; with given
// statistics dx = scale g, whatever x is.
template <class A>
struct InputGradient {
  Lanes<A> b, c;
  bool given;
  Lanes<A> operator()(const Affine<A>& affine, Lanes<A> g, Lanes<A> x) const {
    return given ? affine.scale * g : affine.scale * g + ((x - affine.mean) * b + c);
  }
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
