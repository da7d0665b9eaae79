// The operators that ops.py calls. Arguments have been checked there, except for the ids, which only this code reads.
#include "experts.h"
#include "grouped_linear.h"
#include "lora.h"

#include <torch/library.h>

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

std::tuple<Tensor, Tensor> experts_forward(
    const Tensor& hidden, const Tensor& index, const Tensor& weights, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    int64_t num_ids, c10::string_view activation, double alpha, double limit, double offset, bool gated,
    bool transposed, bool interleaved, bool keep_pre) {
  const ExpertsArguments given{hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids,
                               kind_of(activation), alpha, limit, offset, gated, transposed, interleaved};
  return with_dtype(hidden.scalar_type(), [&](auto t) { return Experts<decltype(t)>(given).forward(keep_pre); });
}

std::vector<Tensor> experts_backward(
    const Tensor& grad, const Tensor& pre, const Tensor& hidden, const Tensor& index, const Tensor& weights,
    const Tensor& up_weight, const std::optional<Tensor>& up_bias, const Tensor& down_weight,
    const std::optional<Tensor>& down_bias, int64_t num_ids, c10::string_view activation, double alpha, double limit,
    double offset, bool gated, bool transposed, bool interleaved, std::array<bool, 6> need) {
  const ExpertsArguments given{hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids,
                               kind_of(activation), alpha, limit, offset, gated, transposed, interleaved};
  const NeededGradients needed{need[0], need[1], need[2], need[3], need[4], need[5]};
  return with_dtype(hidden.scalar_type(), [&](auto t) { return Experts<decltype(t)>(given).backward(grad, pre, needed); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_lora_forward(
    const Tensor& hidden, const Tensor& index, const Tensor& weights, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const Tensor& down_weight, const std::optional<Tensor>& down_bias,
    int64_t num_ids, c10::string_view activation, double alpha, double limit, double offset, bool gated,
    bool transposed, bool interleaved, const std::optional<Tensor>& up_a, const std::optional<Tensor>& up_b,
    const std::optional<Tensor>& down_a, const std::optional<Tensor>& down_b, double up_scale, double down_scale,
    bool keep) {
  const ExpertsArguments given{hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids,
                               kind_of(activation), alpha, limit, offset, gated, transposed, interleaved};
  const Factors up{up_a, up_b, up_scale}, down{down_a, down_b, down_scale};
  return with_dtype(
      hidden.scalar_type(), [&](auto t) { return LoraExperts<decltype(t)>(given, up, down).forward(keep); });
}

std::vector<Tensor> experts_lora_backward(
    const Tensor& grad, const Tensor& pre, const Tensor& up_low, const Tensor& down_low, const Tensor& hidden,
    const Tensor& index, const Tensor& weights, const Tensor& up_weight, const std::optional<Tensor>& up_bias,
    const Tensor& down_weight, const std::optional<Tensor>& down_bias, int64_t num_ids, c10::string_view activation,
    double alpha, double limit, double offset, bool gated, bool transposed, bool interleaved,
    const std::optional<Tensor>& up_a, const std::optional<Tensor>& up_b, const std::optional<Tensor>& down_a,
    const std::optional<Tensor>& down_b, double up_scale, double down_scale, std::array<bool, 6> need) {
  const ExpertsArguments given{hidden, index, weights, up_weight, up_bias, down_weight, down_bias, num_ids,
                               kind_of(activation), alpha, limit, offset, gated, transposed, interleaved};
  const Factors up{up_a, up_b, up_scale}, down{down_a, down_b, down_scale};
  const NeededLoraGradients needed{need[0], need[1], need[2], need[3], need[4], need[5]};
  return with_dtype(hidden.scalar_type(), [&](auto t) {
    return LoraExperts<decltype(t)>(given, up, down).backward(grad, pre, up_low, down_low, needed);
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

TORCH_LIBRARY_FRAGMENT(hf_moe_cpu, m) {
  m.def(
      "experts_forward(Tensor hidden, Tensor index, Tensor weights, Tensor up_weight, Tensor? up_bias, "
      "Tensor down_weight, Tensor? down_bias, int num_ids, str activation, float alpha, float limit, float offset, "
      "bool gated, bool transposed, bool interleaved, bool keep_pre) -> (Tensor, Tensor)");
  m.def(
      "experts_backward(Tensor grad, Tensor pre, Tensor hidden, Tensor index, Tensor weights, Tensor up_weight, "
      "Tensor? up_bias, Tensor down_weight, Tensor? down_bias, int num_ids, str activation, float alpha, float limit, "
      "float offset, bool gated, bool transposed, bool interleaved, bool[6] need) -> Tensor[]");
  m.def(
      "experts_lora_forward(Tensor hidden, Tensor index, Tensor weights, Tensor up_weight, Tensor? up_bias, "
      "Tensor down_weight, Tensor? down_bias, int num_ids, str activation, float alpha, float limit, float offset, "
      "bool gated, bool transposed, bool interleaved, Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b, "
      "float up_scale, float down_scale, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "experts_lora_backward(Tensor grad, Tensor pre, Tensor up_low, Tensor down_low, Tensor hidden, Tensor index, "
      "Tensor weights, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, int num_ids, "
      "str activation, float alpha, float limit, float offset, bool gated, bool transposed, bool interleaved, "
      "Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b, float up_scale, float down_scale, bool[6] need) "
      "-> Tensor[]");
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
