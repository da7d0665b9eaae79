// One linear map per expert over rows that are already sorted. Shape suffixes: N rows, E experts, A inner, B outer width.
#pragma once

#include "phases.h"

#include <optional>

namespace hf_moe {

// The rows of expert e end at `expert_end[e]`; rows past the last end belong to no expert.
inline Routing rows_by_end(const Tensor& expert_end_E, int64_t num_rows) {
  const int64_t* end = expert_end_E.const_data_ptr<int64_t>();
  std::vector<int64_t> counts(expert_end_E.numel());
  for (size_t e = 0; e < counts.size(); ++e) {
    counts[e] = end[e] - (e ? end[e - 1] : 0);
    TORCH_CHECK_INDEX(
        counts[e] >= 0 && end[e] <= num_rows, "expert_end[", e, "] = ", end[e], " must not be less than the one before ",
        "nor more than the ", num_rows, " rows.");
  }
  Routing routing;
  lay_out(routing, counts);
  const int64_t rows = counts.empty() ? 0 : routing.experts.back().end;
  for (int64_t r = 0; r < rows; ++r) routing.slot.push_back(r);
  routing.token = routing.slot;
  return routing;
}

// out[N, n] = rows[N, k] times each row's expert's weight (+ bias); zeros for rows without an expert.
template <class T>
void multiply_rows_by_expert(
    const Routing& routing, const T* rows, int64_t num_rows, const ExpertWeights<T>& weights, const T* bias, T* out) {
  using C = typename compute<T>::type;
  using A = Acc<C>;
  int64_t chunks;
  const int64_t at_once = columns_at_once<C>(weights);
  const std::vector<Task> tasks = plan_tasks(routing, weights.n, at_once, &chunks);
  run_tasks(tasks.size(), [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t e = task.of->expert;
    const C* left = gather_rows<C, T>(task, rows, weights.k, weights.k, routing.slot.data());
    A* product = scratch<A>(kOut, (kRowsPerTask + 32) * at_once);
    for (int64_t c0 = task.c0; c0 < task.c1; c0 += at_once) {
      const int64_t columns = std::min(at_once, task.c1 - c0);
      const Weight<T> next = weights.of(e, std::min(c0 + columns, weights.n - 1));
      multiply_columns<C, T>(
          weights.of(e, c0), columns, weights.k, task.rows, left, product, at_once,
          c0 + columns < task.c1 ? &next : nullptr);
      if (bias) add_bias(bias + e * weights.n + c0, columns, task.rows, product, at_once);
      for (int64_t r = 0; r < task.rows; ++r)
        convert(product + r * at_once, out + (task.first + r) * weights.n + c0, columns);
    }
  });
  std::fill(out + routing.rows() * weights.n, out + num_rows * weights.n, T(0.0f));
}

template <class T>
Tensor grouped_linear(
    const Tensor& rows_NA, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& expert_end_E,
    bool transposed) {
  const ExpertWeights<T> weights = weights_of<T>(weight, transposed);
  Tensor out = fresh({rows_NA.size(0), weights.n}, rows_NA.options());
  multiply_rows_by_expert<T>(
      rows_by_end(expert_end_E, rows_NA.size(0)), rows_NA.const_data_ptr<T>(), rows_NA.size(0), weights,
      bias ? bias->template const_data_ptr<T>() : nullptr, out.data_ptr<T>());
  return out;
}

// Gradients of rows, weight and bias; empty where not needed.
template <class T>
std::vector<Tensor> grouped_linear_backward(
    const Tensor& grad_NB, const Tensor& rows_NA, const Tensor& weight, const Tensor& expert_end_E, bool transposed,
    std::array<bool, 3> need) {
  using C = typename compute<T>::type;
  const ExpertWeights<T> weights = weights_of<T>(weight, transposed);
  const Routing routing = rows_by_end(expert_end_E, rows_NA.size(0));
  const GatheredRows<T, C> grads{grad_NB.const_data_ptr<T>(), routing.slot.data(), weights.n, weights.n};
  const GatheredRows<T, C> rows{rows_NA.const_data_ptr<T>(), routing.slot.data(), weights.k, weights.k};
  std::vector<Tensor> out(3, at::empty({0}, rows_NA.options()));
  for (Tensor& tensor : out) tensor = at::empty({0}, rows_NA.options());
  if (need[0]) {
    out[0] = fresh(rows_NA.sizes(), rows_NA.options());
    multiply_rows_by_expert<T>(
        routing, grads.base, rows_NA.size(0), weights.swapped(), static_cast<const T*>(nullptr), out[0].data_ptr<T>());
  }
  if (need[1]) {
    out[1] = fresh(weight.sizes(), weight.options());
    const GatheredRows<T, C>&left = transposed ? rows : grads, &right = transposed ? grads : rows;
    weight_gradient<C, T>(routing, left, right, weight.size(1), weight.size(2), out[1].data_ptr<T>());
  }
  if (need[2]) {
    out[2] = at::empty({weight.size(0), weights.n}, rows_NA.options());
    bias_gradient<C, T>(routing, grads, nullptr, weights.n, out[2].data_ptr<T>());
  }
  return out;
}

}  // namespace hf_moe
