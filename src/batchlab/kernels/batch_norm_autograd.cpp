// The way of batch norm's kernels into autograd, as one node in C++: in Python it costs more than a small batch itself.
//
// It needs LibTorch's full headers, and nothing of the kernels but the names of their operations. A gradient that is to
// be differentiated again goes to `differentiable_backward`, plain operations in Python, right at any order.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, const Optional&,
                                           const Optional&, const Optional&, const Optional&, double, double, int64_t,
                                           const Optional&);
using Evaluate = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                                            const Optional&, const Optional&, double, int64_t, const Optional&);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&,
                                                            const Optional&, const Optional&, const Optional&,
                                                            const Tensor&, const Optional&, double, int64_t, bool,
                                                            const Optional&);
using EmptyMask = Tensor(const Tensor&);
using UnpackMask = Tensor(const Tensor&, const Tensor&);
using Differentiable = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&,
                                                                  const Optional&, const Optional&, const Optional&,
                                                                  const Optional&, double, int64_t);

// One of the kernels' operations, looked up once for each `name`.
template <class Signature, class Name>
const c10::TypedOperatorHandle<Signature>& operation(Name name) {
  static const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(name(), "").template typed<Signature>();
  return found;
}
const auto& forward_operation() {
  return operation<Forward>([] { return "batchlab_batch_norm::forward_"; });
}
const auto& evaluate_operation() {
  return operation<Evaluate>([] { return "batchlab_batch_norm::evaluate"; });
}
const auto& backward_operation() {
  return operation<Backward>([] { return "batchlab_batch_norm::backward"; });
}
const auto& empty_mask_operation() {
  return operation<EmptyMask>([] { return "batchlab_batch_norm::empty_relu_mask"; });
}
const auto& unpack_mask_operation() {
  return operation<UnpackMask>([] { return "batchlab_batch_norm::unpack_relu_mask"; });
}
const auto& differentiable_operation() {
  return operation<Differentiable>([] { return "batchlab_batch_norm::differentiable_backward"; });
}

constexpr int64_t kRelu = 1, kLeakyRelu = 2;
constexpr int64_t kSilu = 3;  // the activation whose derivative the output does not tell

Optional given(const Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }

// A bit a number instead of the output, where a ReLU has a residual. Compilers see the output: it is saved by what comes
// behind as well, for all that they know, and has a size that they understand.
Optional mask_for(const Tensor& x, const Optional& residual, int64_t activation) {
  const bool pays = residual && (activation == kRelu || activation == kLeakyRelu) && x.is_cpu() &&
                    !x.key_set().has(c10::DispatchKey::Python);
  return pays ? Optional(empty_mask_operation().call(x)) : std::nullopt;
}

// What the backward pass reads: `statistics` are the mean and variance that were given, in evaluation.
void save(AutogradContext* ctx, const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual,
          const Tensor& y, const Tensor& saved, const Tensor& statistics, const Optional& mask, double eps,
          int64_t activation) {
  const bool behind = residual && activation != 0;
  const bool by_output = behind && !mask && activation != kSilu;
  ctx->save_for_backward({x, weight.value_or(Tensor()), bias.value_or(Tensor()), saved, by_output ? y : Tensor(),
                          behind && activation == kSilu ? *residual : Tensor(), statistics, mask.value_or(Tensor())});
  ctx->saved_data["eps"] = eps;
  ctx->saved_data["activation"] = activation;
  ctx->saved_data["residual"] = residual.has_value();
  ctx->mark_non_differentiable({saved});
  ctx->set_materialize_grads(false);
}

// Gradients of x, weight, bias and residual.
variable_list gradients(AutogradContext* ctx, const variable_list& behind) {
  const Tensor& gradient = behind[0];
  if (!gradient.defined()) return {Tensor(), Tensor(), Tensor(), Tensor()};
  const auto saved = ctx->get_saved_variables();
  const int64_t activation = ctx->saved_data["activation"].toInt();
  // Of x, weight, bias and residual; autograd counts only those that were given.
  const bool present[] = {true, saved[1].defined(), saved[2].defined(), ctx->saved_data["residual"].toBool()};
  bool needed[4];
  for (int i = 0, edge = 0; i < 4; ++i) needed[i] = present[i] && ctx->needs_input_grad(edge++);
  Tensor found[4];
  if (at::GradMode::is_enabled()) {  // create_graph=True
    // As good as the output, of which only the sign counts.
    const Optional output = saved[7].defined()
                                ? Optional(unpack_mask_operation().call(saved[7], saved[0].detach()))
                                : given(saved[4]);
    std::tie(found[0], found[1], found[2], found[3]) = differentiable_operation().call(
        gradient, saved[0], given(saved[1]), given(saved[2]), output, given(saved[5]), given(saved[6]),
        ctx->saved_data["eps"].toDouble(), activation);
  } else {
    const double count = saved[6].defined() ? std::numeric_limits<double>::infinity() : 0;
    std::tie(found[0], found[3], found[1], found[2]) = backward_operation().call(
        gradient, saved[0], given(saved[1]), given(saved[2]), given(saved[4]), given(saved[5]), saved[3], std::nullopt,
        count, activation, needed[3], given(saved[7]));
    if (activation == 0) found[3] = gradient;
  }
  variable_list result(4);
  for (int i = 0; i < 4; ++i)
    if (needed[i]) result[i] = found[i];
  return result;
}

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Optional& weight, const Optional& bias,
                               const Optional& residual, const Optional& running_mean, const Optional& running_var,
                               const Optional& batches, double momentum, double eps, int64_t activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Optional mask = mask_for(x, residual, activation);
    auto [y, saved] = forward_operation().call(x, weight, bias, residual, running_mean, running_var, batches, momentum, eps,
                                               activation, mask);
    save(ctx, x, weight, bias, residual, y, saved, Tensor(), mask, eps, activation);
    return {y, saved};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& behind) {
    variable_list result = gradients(ctx, behind);
    result.resize(10);
    return result;
  }
};

struct Evaluation : torch::autograd::Function<Evaluation> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Optional& weight, const Optional& bias,
                               const Optional& residual, const Tensor& mean, const Tensor& variance, double eps,
                               int64_t activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Optional mask = mask_for(x, residual, activation);
    auto [y, saved] = evaluate_operation().call(x, mean, variance, weight, bias, residual, eps, activation, mask);
    // Copies: training may move the originals before this gradient is asked for, as it may in `saved`.
    save(ctx, x, weight, bias, residual, y, saved, at::stack({mean, variance}), mask, eps, activation);
    return {y, saved};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& behind) {
    variable_list result = gradients(ctx, behind);
    result.resize(8);
    return result;
  }
};

std::tuple<Tensor, Tensor> forward_(const Tensor& x, const Optional& weight, const Optional& bias,
                                    const Optional& residual, const Optional& running_mean, const Optional& running_var,
                                    const Optional& batches, double momentum, double eps, int64_t activation,
                                    const Optional& mask) {
  const bool recorded = torch::autograd::compute_requires_grad(x, weight, bias, residual);
  TORCH_CHECK(!mask || !recorded, "batch_norm: what records a gradient makes its own relu_mask");
  // Who saved them for a gradient has to notice that they move.
  for (const auto* moved : {&running_mean, &running_var, &batches})
    if (*moved) torch::autograd::increment_version(**moved);
  if (!recorded) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operation().call(x, weight, bias, residual, running_mean, running_var, batches, momentum, eps,
                                    activation, mask);
  }
  auto found = BatchNorm::apply(x, weight, bias, residual, running_mean, running_var, batches, momentum, eps, activation);
  return {found[0], found[1]};
}

std::tuple<Tensor, Tensor> evaluate(const Tensor& x, const Tensor& mean, const Tensor& variance, const Optional& weight,
                                    const Optional& bias, const Optional& residual, double eps, int64_t activation,
                                    const Optional& mask) {
  const bool recorded = torch::autograd::compute_requires_grad(x, weight, bias, residual);
  TORCH_CHECK(!mask || !recorded, "batch_norm: what records a gradient makes its own relu_mask");
  if (!recorded) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return evaluate_operation().call(x, mean, variance, weight, bias, residual, eps, activation, mask);
  }
  auto found = Evaluation::apply(x, weight, bias, residual, mean, variance, eps, activation);
  return {found[0], found[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(batchlab_batch_norm, Autograd, m) {
  m.impl("forward_", TORCH_FN(forward_));
  m.impl("evaluate", TORCH_FN(evaluate));
}
