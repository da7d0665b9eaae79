// Forward and backward of the experts of one layer, for one dtype.
//
// Shape suffixes: T tokens, K slots per token, N sorted rows, E experts, H hidden, I width, P pre-activations (2I or I).
#pragma once

#include "activation.h"
#include "phases.h"

#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>

namespace hf_moe {

struct ExpertsArguments {
  Tensor hidden_TH, index_TK, weights_TK, up_weight;
  std::optional<Tensor> up_bias;
  Tensor down_weight;
  std::optional<Tensor> down_bias;
  int64_t num_ids;
  Kind kind;
  double alpha, limit, offset;
  bool gated, transposed, interleaved;
};

struct NeededGradients {
  bool hidden, weights, up_weight, up_bias, down_weight, down_bias;
};

template <class T>
class Experts {
 protected:
  using C = typename compute<T>::type;
  using A = Acc<C>;
  using Term = LowRankTerm<C, T>;
  static constexpr int64_t kWide = kColumns<C>;

 public:
  explicit Experts(const ExpertsArguments& given)
      : given_(given),
        up_(weights_of<T>(given.up_weight, given.transposed)),
        down_(weights_of<T>(given.down_weight, given.transposed)),
        routing_(sort_rows(given.index_TK, given.up_weight.size(0), given.num_ids)),
        activation_{given.kind, A(given.alpha), A(given.limit), A(given.offset), given.gated, given.interleaved},
        tokens_(given.hidden_TH.size(0)), hidden_(given.hidden_TH.size(1)), width_(down_.k) {
    row_weight_.resize(routing_.rows());
    const Tensor weights = given.weights_TK.to(c10::CppTypeToScalarType<A>::value).contiguous();
    const A* from = weights.template const_data_ptr<A>();
    for (int64_t n = 0; n < routing_.rows(); ++n) row_weight_[n] = from[routing_.slot[n]];
  }

  // out [T, H] and, if kept, the pre-activations [N, P] of the sorted rows, zeros for sentinels. The terms are added to
  // the two products, if they are not null.
  std::tuple<Tensor, Tensor> forward(
      bool keep_pre, const Term* up_term = nullptr, const Term* down_term = nullptr) const {
    Tensor pre = kept_rows(keep_pre ? up_.n : 0);
    const Tensor act = left_operand(width_);
    activate(keep_pre ? pre.data_ptr<T>() : nullptr, act.data_ptr<C>(), up_term, down_term);
    Tensor out = fresh({tokens_, hidden_}, given_.hidden_TH.options());
    sum_over_experts<C, T>(
        routing_, act.const_data_ptr<C>(), down_, bias(given_.down_bias), down_term, row_weight_.data(), tokens_,
        out.data_ptr<T>());
    return {out, pre};
  }

  // Gradients of hidden, weights, up weight, up bias, down weight, down bias; empty where not needed.
  std::vector<Tensor> backward(const Tensor& grad_TH, const Tensor& pre, const NeededGradients& need) const {
    const bool need_pre = need.hidden || need.up_weight || need.up_bias;
    const Tensor d_pre = left_operand(need_pre ? up_.n : 0), act = left_operand(need.down_weight ? width_ : 0);
    const GatheredRows<T, C> grads{grad_TH.const_data_ptr<T>(), routing_.token.data(), hidden_, hidden_};
    const GatheredRows<T, C> inputs{given_.hidden_TH.const_data_ptr<T>(), routing_.token.data(), hidden_, hidden_};
    const PanelRows<C> d_pres = panel_rows(d_pre, up_.n), acts = panel_rows(act, width_);
    std::vector<Tensor> out;
    for (int i = 0; i < 6; ++i) out.push_back(at::empty({0}, given_.hidden_TH.options()));
    Tensor d_weights = activate_backward(
        grad_TH.const_data_ptr<T>(), pre.const_data_ptr<T>(), need_pre ? d_pre.data_ptr<C>() : nullptr,
        need.down_weight ? act.data_ptr<C>() : nullptr, need_pre || need.weights, need.weights);
    if (need.weights) out[1] = d_weights.to(given_.weights_TK.scalar_type());
    if (need.hidden) out[0] = hidden_gradient(d_pre.const_data_ptr<C>());
    if (need.up_weight) out[2] = gradient_of(given_.up_weight, d_pres, inputs);
    if (need.down_weight) out[4] = gradient_of(given_.down_weight, grads, acts);
    if (need.up_bias) out[3] = bias_gradient_of(d_pres, nullptr, up_.n);
    if (need.down_bias) out[5] = bias_gradient_of(grads, row_weight_.data(), hidden_);
    return out;
  }

 protected:
  // Memory for values [N, columns] of the sorted rows, zero for sentinels; none if there are no columns.
  Tensor kept_rows(int64_t columns) const {
    if (columns == 0) return at::empty({0}, given_.hidden_TH.options());
    Tensor rows = fresh({given_.index_TK.numel(), columns}, given_.hidden_TH.options());
    rows.narrow(0, routing_.rows(), rows.size(0) - routing_.rows()).zero_();
    return rows;
  }
  Tensor left_operand(int64_t k) const {
    const int64_t elements = k ? panel_size<C>(k) * (routing_.padded_rows / kRows) : 0;
    return fresh({elements}, given_.hidden_TH.options().dtype(c10::CppTypeToScalarType<C>::value));
  }
  const C* panels_of(const C* left, int64_t k, const Task& task) const {
    return left + routing_.panel_row[task.first] / kRows * panel_size<C>(k);
  }
  PanelRows<C> panel_rows(const Tensor& left, int64_t k) const {
    return {left.const_data_ptr<C>(), routing_.panel_row.data(), panel_size<C>(k)};
  }
  static const T* bias(const std::optional<Tensor>& b) { return b ? b->template const_data_ptr<T>() : nullptr; }

  int step() const { return activation_.gated && activation_.interleaved ? 2 : 1; }
  A* up_part(A* line, int64_t apart) const {
    return activation_.gated ? line + (activation_.interleaved ? 1 : apart) : nullptr;
  }

  // Low-rank rows are computed in a task that has all columns; where there is none, in a phase of its own.
  static int64_t tasks_per_thread(bool low_rank) { return low_rank ? 4 : 6; }

  // Calls f(first column, columns, offset in a line) for the pre-activations of activations i0..i0+n; in a line gate
  // and up lie `apart` or alternate.
  template <class F>
  void for_parts(int64_t i0, int64_t n, int64_t apart, const F& f) const {
    if (activation_.gated && activation_.interleaved) return f(2 * i0, 2 * n, 0);
    f(i0, n, 0);
    if (activation_.gated) f(width_ + i0, n, apart);
  }

  void activate(T* pre, C* act, const Term* up_term, const Term* down_term) const {
    int64_t chunks;
    const int64_t parts = activation_.gated ? 2 : 1;
    const int64_t at_once = round_up(columns_at_once<C>(up_) / parts, kWide);
    const std::vector<Task> tasks = plan_tasks(routing_, width_, at_once, &chunks, tasks_per_thread(up_term || down_term));
    const auto gather = [&](const Task& task) {
      return gather_rows<C, T>(task, given_.hidden_TH.const_data_ptr<T>(), hidden_, hidden_, routing_.token.data());
    };
    const auto act_of = [&](const Task& task) { return panels_of(act, width_, task); };
    compute_shared(up_term, tasks, chunks, gather);
    run_tasks(tasks.size(), [&](int64_t i) {
      const Task& task = tasks[i];
      const C* left = gather(task);
      if (up_term && chunks == 1) up_term->compute(task, left);
      A* product = scratch<A>(kOut, (kRowsPerTask + 32) * parts * at_once);
      for (int64_t i0 = task.c0; i0 < task.c1; i0 += at_once) {
        const int64_t n = std::min(at_once, task.c1 - i0);
        for_parts(i0, n, at_once, [&](int64_t column, int64_t columns, int64_t at) {
          multiply_up(task, column, columns, left, product + at, parts * at_once, i0 + n < task.c1, up_term);
          if (pre)
            for (int64_t r = 0; r < task.rows; ++r)
              convert(product + r * parts * at_once + at, pre + (task.first + r) * up_.n + column, columns);
        });
        write_activations(task, i0, n, product, parts * at_once, act);
      }
      if (down_term && chunks == 1) down_term->compute(task, act_of(task));
    });
    compute_shared(down_term, tasks, chunks, act_of);
  }

  // Pre-activations column..column+columns of a task's rows.
  void multiply_up(
      const Task& task, int64_t column, int64_t columns, const C* left, A* product, int64_t step, bool more,
      const Term* term) const {
    const int64_t e = task.of->expert;
    const Weight<T> next = up_.of(e, std::min(column + columns, up_.n - 1));
    const auto added = columns_of(term, *task.of, task.first, column);
    multiply_columns<C, T>(
        up_.of(e, column), columns, hidden_, task.rows, left, product, step, more ? &next : nullptr, pointer(added));
    if (given_.up_bias) add_bias(bias(given_.up_bias) + e * up_.n + column, columns, task.rows, product, step);
  }

  void write_activations(const Task& task, int64_t i0, int64_t n, A* product, int64_t stride, C* act) const {
    const int64_t panel = panel_size<C>(width_), row0 = routing_.panel_row[task.first];
    A* line = scratch<A>(kLine, n);
    with_kind(activation_.kind, [&](auto kind) {
      for (int64_t r = 0; r < task.rows; ++r) {
        A* gate = product + r * stride;
        activate_row<decltype(kind)::value>(gate, up_part(gate, stride / 2), step(), n, activation_, line);
        write_row(line, n, act, panel, row0 + r, i0);
        if (i0 + n == width_) pad_row(act, panel, row0 + r, width_);
      }
    });
  }

  // From the output's gradient to that of the pre-activations (times the routing weight), the weighted activations and
  // the routing weights' gradient [T, K]; every task has its own part of all three. `down_term` is added to the
  // activations' gradient; `up_term` gets its low-rank rows from the pre-activations' gradient.
  Tensor activate_backward(
      const T* grad, const T* pre, C* d_pre, C* act, bool need_d_act, bool need_weights,
      const Term* down_term = nullptr, const Term* up_term = nullptr) const {
    int64_t chunks;
    const ExpertWeights<T> turned = down_.swapped();
    const int64_t at_once = columns_at_once<C>(turned);
    const std::vector<Task> tasks = plan_tasks(routing_, width_, at_once, &chunks, tasks_per_thread(down_term || up_term));
    Tensor d_weights = at::zeros(
        {need_weights ? chunks : 0, given_.index_TK.size(0), given_.index_TK.size(1)},
        given_.hidden_TH.options().dtype(c10::CppTypeToScalarType<A>::value));
    if (!need_d_act && !act) return d_weights;
    const auto gather = [&](const Task& task) {
      return gather_rows<C, T>(task, grad, hidden_, hidden_, routing_.token.data());
    };
    const auto d_pre_of = [&](const Task& task) { return panels_of(d_pre, up_.n, task); };
    compute_shared(down_term, tasks, chunks, gather);
    run_tasks(tasks.size(), [&](int64_t i) {
      const Task& task = tasks[i];
      const bool low_first = down_term && chunks == 1;
      const C* left = need_d_act || low_first ? gather(task) : nullptr;
      if (low_first) down_term->compute(task, left);
      A* product = scratch<A>(kOut, (kRowsPerTask + 32) * at_once);
      A* dots = scratch<A>(kSum, kRowsPerTask);
      start_dots(task, grad, need_weights, dots);
      for (int64_t i0 = task.c0; i0 < task.c1; i0 += at_once) {
        const int64_t n = std::min(at_once, task.c1 - i0);
        if (need_d_act) {
          const auto added = columns_of(down_term, *task.of, task.first, i0);
          multiply_columns<C, T>(
              turned.of(task.of->expert, i0), n, hidden_, task.rows, left, product, at_once, nullptr, pointer(added));
        } else {
          std::fill(product, product + task.rows * at_once, A(0));
        }
        write_pre_gradients(task, i0, n, product, at_once, pre, d_pre, act, dots);
      }
      if (need_weights) {
        A* to = d_weights.template data_ptr<A>() + task.chunk * given_.index_TK.numel();
        for (int64_t r = 0; r < task.rows; ++r) to[routing_.slot[task.first + r]] = dots[r];
      }
      if (up_term && chunks == 1) up_term->compute(task, d_pre_of(task));
    });
    compute_shared(up_term, tasks, chunks, d_pre_of);
    return need_weights ? d_weights.sum(0) : d_weights;
  }

  // The down bias' part of the routing weights' gradient; it counts once.
  void start_dots(const Task& task, const T* grad, bool need_weights, A* dots) const {
    std::fill(dots, dots + task.rows, A(0));
    if (!need_weights || !given_.down_bias || task.chunk) return;
    const T* b = bias(given_.down_bias) + task.of->expert * hidden_;
    for (int64_t r = 0; r < task.rows; ++r) {
      const T* row = grad + routing_.token[task.first + r] * hidden_;
      for (int64_t h = 0; h < hidden_; ++h) dots[r] += widen(row[h]) * widen(b[h]);
    }
  }

  void write_pre_gradients(
      const Task& task, int64_t i0, int64_t n, const A* d_act, int64_t stride, const T* pre, C* d_pre, C* act,
      A* dots) const {
    const int64_t panel = panel_size<C>(width_), pre_panel = panel_size<C>(up_.n);
    const int64_t row0 = routing_.panel_row[task.first];
    A *line = scratch<A>(kLine, 5 * n), *d_line = line + 2 * n, *values = line + 4 * n;
    with_kind(activation_.kind, [&](auto kind) {
      for (int64_t r = 0; r < task.rows; ++r) {
        const T* row = pre + (task.first + r) * up_.n;
        for_parts(i0, n, n, [&](int64_t c, int64_t count, int64_t at) { convert(row + c, line + at, count); });
        const A weight = row_weight_[task.first + r];
        dots[r] += activate_row_backward<decltype(kind)::value>(
            line, up_part(line, n), step(), n, activation_, weight, d_act + r * stride, values, d_line,
            up_part(d_line, n));
        if (act) {
          for (int64_t c = 0; c < n; ++c) values[c] *= weight;
          write_row(values, n, act, panel, row0 + r, i0);
          if (i0 + n == width_) pad_row(act, panel, row0 + r, width_);
        }
        if (!d_pre) continue;
        for_parts(i0, n, n, [&](int64_t c, int64_t count, int64_t at) {
          write_row(d_line + at, count, d_pre, pre_panel, row0 + r, c);
        });
        if (i0 + n == width_) pad_row(d_pre, pre_panel, row0 + r, up_.n);
      }
    });
  }

  Tensor hidden_gradient(const C* d_pre, const Term* up_term = nullptr) const {
    Tensor out = fresh({tokens_, hidden_}, given_.hidden_TH.options());
    sum_over_experts<C, T>(
        routing_, d_pre, up_.swapped(), static_cast<const T*>(nullptr), up_term, nullptr, tokens_, out.data_ptr<T>());
    return out;
  }

  // Gradient [E, n, k] or [E, k, n] of a weight whose outputs have the gradients `outs` and whose inputs were `ins`.
  template <class Outs, class Ins>
  Tensor gradient_of(const Tensor& weight, const Outs& outs, const Ins& ins) const {
    Tensor out = fresh(weight.sizes(), weight.options());
    const int64_t a = weight.size(1), b = weight.size(2);
    if (given_.transposed) weight_gradient<C, T>(routing_, ins, outs, a, b, out.data_ptr<T>());
    else weight_gradient<C, T>(routing_, outs, ins, a, b, out.data_ptr<T>());
    return out;
  }

  template <class Source>
  Tensor bias_gradient_of(const Source& rows, const A* row_weight, int64_t columns) const {
    Tensor out = at::empty({given_.up_weight.size(0), columns}, given_.hidden_TH.options());
    bias_gradient<C, T>(routing_, rows, row_weight, columns, out.data_ptr<T>());
    return out;
  }

  ExpertsArguments given_;
  ExpertWeights<T> up_, down_;
  Routing routing_;
  Activation<A> activation_;
  int64_t tokens_, hidden_, width_;
  std::vector<A> row_weight_;
};

}  // namespace hf_moe
