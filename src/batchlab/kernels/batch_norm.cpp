// Batch norm, its residual and its activation, forward and backward, in two passes over memory each.
//
// Statistics are sums around a pivot near the mean, float in lanes over few numbers and double beyond, so that a mean
// of 10^4 standard deviations costs no digits. Saved for the backward pass are the input, weight, bias and three numbers
// a channel, as many bytes as torch's batch norm alone saves: what went into the activation is computed again, in the
// pass that reads the input anyway. Behind a residual that would take a second tensor: of a ReLU a bit a number is kept
// instead (batch_norm_relu_mask.hpp).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <tuple>

#include "batch_norm_backward.hpp"

namespace {

using namespace batchlab;
using Optional = std::optional<Tensor>;

// Before anything is made for a call: results have the input's strides.
void check_layout(const Tensor& x) {
  check_input(x);
  STD_TORCH_CHECK(x.numel() == 0 || is_contiguous(x) || is_channels_last(x),
                  "batch_norm: the input is neither contiguous nor channels-last");
}

bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

int64_t bytes_of_mask(const Tensor& x) {
  return is_wide(x) ? ReluMask<double>::size(layout_of<double>(x)) : ReluMask<float>::size(layout_of<float>(x));
}

template <class A>
ChannelNumbers<A> numbers_in(Tensor& saved, const Scratch<A>& found) {
  return {static_cast<A*>(saved.mutable_data_ptr()), found + 0, saved.size(1)};
}

template <class A>
Parameters<A> parameters_of(const Optional& weight, const Optional& bias, double eps = 0) {
  return {data_or_null<A>(weight), data_or_null<A>(bias), eps};
}

// Of a ReLU with a residual: what `empty_relu_mask` made for such an input, and `forward` filled in.
void check_mask(const Tensor& x, const Optional& mask, int64_t activation) {
  if (!mask) return;
  STD_TORCH_CHECK(is_relu(activation), "batch_norm: relu_mask is a (leaky) ReLU's");
  const int64_t bytes = bytes_of_mask(x);
  STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == bytes && mask->scalar_type() == ScalarType::Byte &&
                      mask->stride(0) == 1 && mask->is_cpu(),
                  "batch_norm: relu_mask must be ", bytes, " contiguous bytes in uint8 on the CPU for this input");
}
void check_mask(const Tensor& x, const Optional& mask, const Optional& residual, int64_t activation) {
  check_mask(x, mask, activation);
  STD_TORCH_CHECK(!mask || residual, "batch_norm: relu_mask is for what has a residual");
}
template <class A>
ReluMask<A> mask_in(const Optional& mask) {
  return {mask ? static_cast<uint8_t*>(const_cast<void*>(mask->const_data_ptr())) : nullptr};
}

void check_parameters(const Tensor& x, const Optional& weight, const Optional& bias) {
  check_layout(x);
  check_channels(x, weight, "weight", is_wide(x));
  check_channels(x, bias, "bias", is_wide(x));
}

// y and the numbers to save. Running statistics move by `momentum`, and the number of batches by one, if they are given.
std::tuple<Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias, Optional residual, Optional running_mean,
                                   Optional running_var, Optional batches, double momentum, double eps,
                                   int64_t activation, Optional mask) {
  check_parameters(x, weight, bias);
  check_mask(x, mask, residual, activation);
  for (const auto* running : {&running_mean, &running_var})
    check_channels(x, *running, "a running statistic", *running && is_wide(**running));
  STD_TORCH_CHECK(!batches || (batches->numel() == 1 && batches->scalar_type() == ScalarType::Long),
                  "batch_norm: num_batches_tracked must be one int64 number");
  const Optional other = aligned(x, residual, "residual");
  Tensor y = empty_as(x);
  const int64_t channels = x.size(1), count = channels == 0 ? 0 : x.numel() / channels;
  Tensor saved = vectors(kSaved, channels, is_wide(x));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    using A = typename Computed<T>::type;
    const Scratch<A> found(4 * channels);
    const auto numbers = numbers_in(saved, found);
    if (x.numel() == 0) {
      std::fill_n(numbers[0], kSaved * channels, A(0));
      return;
    }
    normalize<T, A>(x, other, y, parameters_of<A>(weight, bias, eps), numbers, mask_in<A>(mask), activation);
    if (count < 2) return;
    move<A>(running_mean, channels, momentum, numbers[kMean], 1.0, numbers[kLost]);
    move<A>(running_var, channels, momentum, numbers[kVariance], static_cast<double>(count) / (count - 1), nullptr);
  });
  if (batches && count >= 2) ++*static_cast<int64_t*>(batches->mutable_data_ptr());
  return {y, saved};
}

// With given mean and biased variance, in float32 or float64: y and the numbers to save.
std::tuple<Tensor, Tensor> evaluate(Tensor x, Tensor mean, Tensor variance, Optional weight, Optional bias,
                                    Optional residual, double eps, int64_t activation, Optional mask) {
  check_parameters(x, weight, bias);
  check_mask(x, mask, residual, activation);
  check_channels(x, mean, "mean", is_wide(mean));
  check_channels(x, variance, "variance", is_wide(variance));
  const Optional other = aligned(x, residual, "residual");
  Tensor y = empty_as(x);
  const int64_t channels = x.size(1);
  Tensor saved = vectors(kSaved, channels, is_wide(x));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    using A = typename Computed<T>::type;
    const Scratch<A> found(4 * channels);
    const auto numbers = numbers_in(saved, found);
    Scratch<double> given(3 * channels);
    copy_numbers(mean, given + 0);
    std::fill_n(given + channels, channels, 0.0);
    copy_numbers(variance, given + 2 * channels);
    parameters_of<A>(weight, bias, eps)
        .prepare(numbers, 0, channels, given + 0, given + channels, given + 2 * channels);
    if (x.numel() > 0) normalize_given<T, A>(x, other, y, numbers, mask_in<A>(mask), activation);
  });
  return {y, saved};
}

// Mean and biased variance of each channel, (2, channels) in float64.
Tensor moments(Tensor x) {
  check_layout(x);
  const int64_t channels = x.size(1);
  Tensor result = vectors(2, channels, true);
  double* found = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(found, 2 * channels, 0.0);
  if (x.numel() == 0) return result;
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Layout layout = layout_of<typename Computed<T>::type>(x);
    with_moments<T>(
        static_cast<const T*>(x.const_data_ptr()), layout, 0.0,
        [&](int64_t from, int64_t to, const double* mean, const double* rest, const double* variance) {
          for (int64_t c = from; c < to; ++c) {
            found[c] = mean[c - from] + rest[c - from];
            found[channels + c] = variance[c - from];
          }
        },
        [](int64_t, int64_t) {}, [](int64_t, int64_t, int64_t, int64_t) {}, [](const Section&, const Block&) {});
  });
  return result;
}

// What the backward operations are given; alike in both.
struct Given {
  Tensor gradient;
  Optional weight, bias, output, residual;
  Tensor saved;
  Optional mask;
  Given(const Tensor& x, const Tensor& gradient_, const Optional& weight_, const Optional& bias_,
        const Optional& output_, const Optional& residual_, const Tensor& saved_, const Optional& mask_,
        int64_t activation)
      : gradient(aligned(x, gradient_, "gradient")),
        weight(weight_),
        bias(bias_),
        output(aligned(x, output_, "output")),
        residual(aligned(x, residual_, "residual")),
        saved(saved_),
        mask(mask_) {
    check_parameters(x, weight, bias);
    check_mask(x, mask, activation);
    check_numbers(saved, kSaved, x.size(1), is_wide(x), "saved");
  }

  // f(the problem): the numbers that were saved, and what the forward pass found from them.
  template <class T, class F>
  void with_problem(const Tensor& x, int64_t activation, F&& f) const {
    using A = typename Computed<T>::type;
    const int64_t channels = x.size(1);
    const Scratch<A> found(2 * channels);
    const ChannelNumbers<A> numbers{const_cast<A*>(static_cast<const A*>(saved.const_data_ptr())), found + 0, channels};
    parameters_of<A>(weight, bias).scale_and_shift(numbers, 0, channels);
    batchlab::with_problem<T>(x, gradient, output, residual, mask, numbers, activation, f);
  }
};

// Σ g and Σ g (x - mean) of each channel, (2, channels) in float64; g: the gradient in front of the activation.
Tensor gradient_sums(Tensor gradient, Tensor x, Optional weight, Optional bias, Optional output, Optional residual,
                     Tensor saved, int64_t activation) {
  check_layout(x);
  const Given given(x, gradient, weight, bias, output, residual, saved, std::nullopt, activation);
  const int64_t channels = x.size(1);
  Tensor result = vectors(2, channels, true);
  double* sums = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(sums, 2 * channels, 0.0);
  if (x.numel() == 0) return result;
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Layout layout = layout_of<typename Computed<T>::type>(x);
    given.with_problem<T>(x, activation, [&](const auto& problem) {
      const auto summed = [&](int64_t from, int64_t to, const double* one, const double* two) {
        std::copy(one, one + (to - from), sums + from);
        std::copy(two, two + (to - from), sums + channels + from);
      };
      with_sums<T>(layout, problem, summed, false);
    });
  });
  return result;
}

// Gradients of input, residual (empty where it is not needed, or is `gradient` itself), weight and bias. The means are
// over `count` values: 0 for this input's own, infinity where the statistics were given. `sums` are those over all
// ranks, where there are several; those of weight and bias are then left to the caller.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor gradient, Tensor x, Optional weight, Optional bias,
                                                    Optional output, Optional residual, Tensor saved, Optional sums,
                                                    double count, int64_t activation, bool residual_needed,
                                                    Optional mask) {
  check_layout(x);
  const Given given(x, gradient, weight, bias, output, residual, saved, mask, activation);
  const int64_t channels = x.size(1);
  if (sums) check_numbers(*sums, 2, channels, true, "sums");
  Tensor input_gradient = empty_as(x);
  Tensor weight_gradient = vector(channels, is_wide(x)), bias_gradient = vector(channels, is_wide(x));
  const bool own = residual_needed && activation != 0;
  Tensor residual_gradient = own ? empty_as(x) : vector(0, is_wide(x));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    using A = typename Computed<T>::type;
    A* of_weight = static_cast<A*>(weight_gradient.mutable_data_ptr());
    A* of_bias = static_cast<A*>(bias_gradient.mutable_data_ptr());
    if (x.numel() == 0) {
      std::fill_n(of_weight, channels, A(0));
      std::fill_n(of_bias, channels, A(0));
      return;
    }
    Layout layout = layout_of<A>(x);
    if (given.output || given.residual || given.mask) layout.use_with_residual();
    Scratch<A> factors(2 * channels);
    given.with_problem<T>(x, activation, [&](auto problem) {
      problem.input_gradient = static_cast<T*>(input_gradient.mutable_data_ptr());
      problem.residual_gradient = own ? static_cast<T*>(residual_gradient.mutable_data_ptr()) : nullptr;
      problem.factors = {factors + 0, nullptr, channels};
      problem.count = count == 0 ? static_cast<double>(layout.count) : count;
      const auto summed = [&](int64_t from, int64_t to, const double* one, const double* two) {
        problem.prepare(from, to, one, two, of_weight, of_bias);
      };
      if (!sums) {
        problem.kept = problem.pays_to_keep(layout);
        return with_sums<T>(layout, problem, summed, true);
      }
      const double* all = static_cast<const double*>(sums->const_data_ptr());
      summed(0, channels, all, all + channels);
      without_sums<T>(layout, problem);
    });
  });
  return {input_gradient, residual_gradient, weight_gradient, bias_gradient};
}

// A mask for `forward` to fill in.
Tensor empty_relu_mask(Tensor x) {
  check_layout(x);
  return bytes(bytes_of_mask(x));
}

// 1 where the mask lets a gradient through and 0 elsewhere, like x.
Tensor unpack_relu_mask(Tensor mask, Tensor x) {
  check_layout(x);
  check_mask(x, mask, static_cast<int64_t>(Activation::relu));
  Tensor result = empty_as(x);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    unpack(layout_of<typename Computed<T>::type>(x), mask_in<typename Computed<T>::type>(mask),
           static_cast<T*>(result.mutable_data_ptr()));
  });
  return result;
}

int64_t release_memory() { return WaitingMemory::instance().release(); }

}  // namespace

STABLE_TORCH_LIBRARY(batchlab_batch_norm, m) {
  m.def(
      "forward_(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float momentum, float eps, int activation, "
      "Tensor(d!)? relu_mask=None) -> "
      "(Tensor, Tensor)");
  m.def(
      "evaluate(Tensor x, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "int activation, Tensor(a!)? relu_mask=None) -> (Tensor, Tensor)");
  m.def("moments(Tensor x) -> Tensor");
  m.def(
      "gradient_sums(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor? output, Tensor? residual, "
      "Tensor saved, int activation) -> Tensor");
  m.def(
      "backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor? output, Tensor? residual, "
      "Tensor saved, Tensor? sums, float count, int activation, bool residual_needed, Tensor? relu_mask=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("empty_relu_mask(Tensor x) -> Tensor");
  m.def("unpack_relu_mask(Tensor relu_mask, Tensor x) -> Tensor");
  m.def("release_memory() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(batchlab_batch_norm, CPU, m) {
  m.impl("forward_", TORCH_BOX(&forward));
  m.impl("evaluate", TORCH_BOX(&evaluate));
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("gradient_sums", TORCH_BOX(&gradient_sums));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("empty_relu_mask", TORCH_BOX(&empty_relu_mask));
  m.impl("unpack_relu_mask", TORCH_BOX(&unpack_relu_mask));
}

STABLE_TORCH_LIBRARY_IMPL(batchlab_batch_norm, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&release_memory));
}
