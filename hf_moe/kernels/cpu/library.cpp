// The operators that ops.py and low_rank.py call. Arguments have been checked there, except for the ids, which only this
// code reads.
#include "experts.h"
#include "grouped_linear.h"
#include "lora.h"

#include <torch/library.h>

#include <string>

namespace hf_moe {
namespace {

Kind kind_of(c10::string_view name) {
  if (name == "silu") return Kind::silu;
  if (name == "gelu") return Kind::gelu;
  if (name == "gelu_tanh") return Kind::gelu_tanh;
  if (name == "relu") return Kind::relu;
  TORCH_CHECK_VALUE(name == "relu2", "unknown activation ", name);
  return Kind::relu2;
}

template <class F>
auto with_dtype(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat: return f(float());
    case at::kDouble: return f(double());
    case at::kBFloat16: return f(bf16());
    default: return f(half());
  }
}

// With ids of 64 bits, and contiguous what the kernels do not read by strides.
ExpertsArguments readable(ExpertsArguments given) {
  given.hidden_TH = given.hidden_TH.contiguous();
  given.index_TK = given.index_TK.to(at::kLong).contiguous();
  if (given.up_bias) given.up_bias = given.up_bias->contiguous();
  if (given.down_bias) given.down_bias = given.down_bias->contiguous();
  return given;
}

std::tuple<Tensor, Tensor> experts_forward(
    const Tensor& hidden, const Tensor& index, const Tensor& weights, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    int64_t num_ids, c10::string_view activation, double alpha, double limit, double offset, bool gated,
    bool transposed, bool interleaved, bool keep_pre) {
  const ExpertsArguments given = readable(
      {hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids, kind_of(activation), alpha, limit,
       offset, gated, transposed, interleaved});
  return with_dtype(hidden.scalar_type(), [&](auto t) { return Experts<decltype(t)>(given).forward(keep_pre); });
}

std::vector<Tensor> experts_backward(
    const Tensor& grad, const Tensor& pre, const Tensor& hidden, const Tensor& index, const Tensor& weights,
    const Tensor& up_weight, const std::optional<Tensor>& up_bias, const Tensor& down_weight,
    const std::optional<Tensor>& down_bias, int64_t num_ids, c10::string_view activation, double alpha, double limit,
    double offset, bool gated, bool transposed, bool interleaved, std::array<bool, 6> need) {
  const ExpertsArguments given = readable(
      {hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids, kind_of(activation), alpha, limit,
       offset, gated, transposed, interleaved});
  const NeededGradients needed{need[0], need[1], need[2], need[3], need[4], need[5]};
  return with_dtype(hidden.scalar_type(), [&](auto t) {
    return Experts<decltype(t)>(given).backward(grad.contiguous(), pre.contiguous(), needed);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_lora_forward(
    const Tensor& hidden, const Tensor& index, const Tensor& weights, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    const std::optional<Tensor>& up_a, const std::optional<Tensor>& up_b, const std::optional<Tensor>& down_a,
    const std::optional<Tensor>& down_b, int64_t num_ids, c10::string_view activation, double alpha, double limit,
    double offset, bool gated, bool transposed, bool interleaved, double up_scale, double down_scale, bool keep) {
  const ExpertsArguments given = readable(
      {hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids, kind_of(activation), alpha, limit,
       offset, gated, transposed, interleaved});
  const Factors up{up_a, up_b, up_scale}, down{down_a, down_b, down_scale};
  return with_dtype(
      hidden.scalar_type(), [&](auto t) { return LoraExperts<decltype(t)>(given, up, down).forward(keep); });
}

std::vector<Tensor> experts_lora_backward(
    const Tensor& grad, const Tensor& pre, const Tensor& up_low, const Tensor& down_low, const Tensor& hidden,
    const Tensor& index, const Tensor& weights, const Tensor& up_weight, const std::optional<Tensor>& up_bias,
    const Tensor& down_weight, const std::optional<Tensor>& down_bias, const std::optional<Tensor>& up_a,
    const std::optional<Tensor>& up_b, const std::optional<Tensor>& down_a, const std::optional<Tensor>& down_b,
    int64_t num_ids, c10::string_view activation, double alpha, double limit, double offset, bool gated,
    bool transposed, bool interleaved, double up_scale, double down_scale, std::array<bool, 6> need) {
  const ExpertsArguments given = readable(
      {hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids, kind_of(activation), alpha, limit,
       offset, gated, transposed, interleaved});
  const Factors up{up_a, up_b, up_scale}, down{down_a, down_b, down_scale};
  const NeededLoraGradients needed{need[0], need[1], need[2], need[3], need[4], need[5]};
  return with_dtype(hidden.scalar_type(), [&](auto t) {
    return LoraExperts<decltype(t)>(given, up, down)
        .backward(grad.contiguous(), pre.contiguous(), up_low.contiguous(), down_low.contiguous(), needed);
  });
}

Tensor grouped_linear_forward(
    const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& expert_end,
    bool transposed) {
  return with_dtype(
      rows.scalar_type(), [&](auto t) { return grouped_linear<decltype(t)>(rows, weight, bias, expert_end, transposed); });
}

std::vector<Tensor> grouped_linear_backward_of(
    const Tensor& grad, const Tensor& rows, const Tensor& weight, const Tensor& expert_end, bool transposed,
    std::array<bool, 3> need) {
  return with_dtype(rows.scalar_type(), [&](auto t) {
    return grouped_linear_backward<decltype(t)>(grad, rows, weight, expert_end, transposed, need);
  });
}

}  // namespace

// The schemas state a call as kernels/layer_call.py does: all tensors, then all settings.
TORCH_LIBRARY_FRAGMENT(hf_moe_cpu, m) {
  const std::string tensors =
      "Tensor hidden, Tensor index, Tensor weights, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
      "Tensor? down_bias, ";
  const std::string factors = "Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b, ";
  const std::string settings =
      "int num_ids, str activation, float alpha, float limit, float offset, bool gated, bool transposed, "
      "bool interleaved, ";
  const std::string call = tensors + settings;
  const std::string adapted = tensors + factors + settings + "float up_scale, float down_scale, ";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("experts_forward(" + call + "bool keep) -> (Tensor, Tensor)");
  define("experts_backward(Tensor grad, Tensor pre, " + call + "bool[6] need) -> Tensor[]");
  define("experts_lora_forward(" + adapted + "bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  define(
      "experts_lora_backward(Tensor grad, Tensor pre, Tensor up_low, Tensor down_low, " + adapted +
      "bool[6] need) -> Tensor[]");
  m.def("grouped_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor expert_end, bool transposed) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor grad, Tensor rows, Tensor weight, Tensor expert_end, bool transposed, "
      "bool[3] need) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(hf_moe_cpu, CPU, m) {
  m.impl("experts_forward", experts_forward);
  m.impl("experts_backward", experts_backward);
  m.impl("experts_lora_forward", experts_lora_forward);
  m.impl("experts_lora_backward", experts_lora_backward);
  m.impl("grouped_linear", grouped_linear_forward);
  m.impl("grouped_linear_backward", grouped_linear_backward_of);
}

}  // namespace hf_moe
