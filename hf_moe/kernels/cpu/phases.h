// The phases that experts and grouped linears are made of. Shape suffixes: T tokens, N sorted rows, E experts.
#pragma once

#include "low_rank.h"

namespace hf_moe {

// A task's rows, gathered from a matrix in the tensors' dtype into a left operand.
template <class C, class T>
C* gather_rows(const Task& task, const T* matrix, int64_t step, int64_t k, const int64_t* row_of) {
  const int64_t panel = panel_size<C>(k);
  C* left = scratch<C>(kLeft, panel * (task.rows / kRows + 2));
  for (int64_t r = 0; r < task.rows; ++r) {
    write_row(matrix + row_of[task.first + r] * step, k, left, panel, r);
    pad_row(left, panel, r, k);
  }
  return left;
}

template <class A, class T>
void add_bias(const T* bias, int64_t columns, int64_t rows, A* product, int64_t step) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) product[r * step + c] += widen(bias[c]);
}

// sum[token] += row_weight * product, for sorted rows first..first+rows.
template <class A>
void add_rows(
    const Routing& routing, int64_t first, int64_t rows, const A* row_weight, const A* product, int64_t product_step,
    int64_t columns, A* sum, int64_t sum_step) {
  for (int64_t r = 0; r < rows; ++r) {
    const A weight = row_weight ? row_weight[first + r] : A(1);
    A* to = sum + routing.token[first + r] * sum_step;
    for (int64_t c = 0; c < columns; ++c) to[c] += weight * product[r * product_step + c];
  }
}

// Whether `sum_over_experts` is for few rows of each expert, whose weights have contiguous columns.
template <class C, class T>
bool has_few_rows(const Routing& routing, const ExpertWeights<T>& weights) {
  const int64_t active = static_cast<int64_t>(routing.active.size());
  const bool by_columns = weights.n_step == 1 && weights.k_step != 1;
  return by_columns && routing.rows() <= 4 * active && active >= 2 * at::get_num_threads();
}

// The same sums with an expert as a task: its weights are read in one run, and its products are kept until all are there.
template <class C, class T>
void sum_few_rows_over_experts(
    const Routing& routing, const C* left, const ExpertWeights<T>& weights, const T* bias, const LowRankTerm<C, T>* low,
    const Acc<C>* row_weight, int64_t num_tokens, T* out) {
  using A = Acc<C>;
  constexpr int64_t run = 4096 / sizeof(T);
  const int64_t panel = panel_size<C>(weights.k), stride = round_up(weights.n, kColumns<C>);
  const std::unique_ptr<A[]> products(new A[routing.rows() * stride]);
  run_tasks(routing.active.size(), [&](int64_t i) {
    const ExpertRows& of = *routing.active[i];
    A* product = scratch<A>(kOut, round_up(of.count(), 32) * stride);
    for (int64_t c0 = 0; c0 < weights.n; c0 += run) {
      const auto added = columns_of(low, of, of.begin, c0);
      multiply_columns<C, T>(
          weights.of(of.expert, c0), std::min(run, weights.n - c0), weights.k, of.count(),
          left + of.padded / kRows * panel, product + c0, stride, nullptr, pointer(added));
    }
    if (bias) add_bias(bias + of.expert * weights.n, weights.n, of.count(), product, stride);
    std::copy_n(product, of.count() * stride, products.get() + of.begin * stride);
  });
  run_tasks((weights.n + run - 1) / run, [&](int64_t i) {
    const int64_t c0 = i * run, columns = std::min(run, weights.n - c0);
    A* sum = scratch<A>(kSum, num_tokens * columns);
    std::fill_n(sum, num_tokens * columns, A(0));
    add_rows(routing, 0, routing.rows(), row_weight, products.get() + c0, stride, columns, sum, columns);
    for (int64_t t = 0; t < num_tokens; ++t) convert(sum + t * columns, out + t * weights.n + c0, columns);
  });
}

// out[t] = sum over the token's rows, experts ascending, of row_weight * (row of `left` times the expert's weight
// + low-rank term + bias). A task owns columns of `out`, so that no two threads add to one value and the order is always
// the same.
template <class C, class T>
void sum_over_experts(
    const Routing& routing, const C* left, const ExpertWeights<T>& weights, const T* bias, const LowRankTerm<C, T>* low,
    const Acc<C>* row_weight, int64_t num_tokens, T* out) {
  using A = Acc<C>;
  if (has_few_rows<C>(routing, weights))
    return sum_few_rows_over_experts<C, T>(routing, left, weights, bias, low, row_weight, num_tokens, out);
  constexpr int64_t wide = kColumns<C>;
  const int64_t at_once = columns_at_once<C>(weights), threads = at::get_num_threads();
  const int64_t width = std::min(at_once, round_up((weights.n + threads - 1) / threads, wide));
  const int64_t panel = panel_size<C>(weights.k);
  run_tasks((weights.n + width - 1) / width, [&](int64_t i) {
    const int64_t c0 = i * width, columns = std::min(width, weights.n - c0), stride = round_up(columns, wide);
    A* sum = scratch<A>(kSum, num_tokens * stride);
    A* product = scratch<A>(kOut, (kRowsPerTask + 32) * stride);
    std::fill(sum, sum + num_tokens * stride, A(0));
    for (size_t a = 0; a < routing.active.size(); ++a) {
      const ExpertRows& of = *routing.active[a];
      const bool more = a + 1 < routing.active.size();
      const Weight<T> next = weights.of(more ? routing.active[a + 1]->expert : of.expert, c0);
      for (int64_t first = of.begin; first < of.end; first += kRowsPerTask) {
        const int64_t rows = std::min(kRowsPerTask, of.end - first);
        const C* from = left + (of.padded + first - of.begin) / kRows * panel;
        const auto added = columns_of(low, of, first, c0);
        multiply_columns<C, T>(
            weights.of(of.expert, c0), columns, weights.k, rows, from, product, stride,
            more && first == of.begin ? &next : nullptr, pointer(added));
        if (bias) add_bias(bias + of.expert * weights.n + c0, columns, rows, product, stride);
        add_rows(routing, first, rows, row_weight, product, stride, columns, sum, stride);
      }
    }
    for (int64_t t = 0; t < num_tokens; ++t) convert(sum + t * stride, out + t * weights.n + c0, columns);
  });
}

constexpr int64_t kLeftColumns = 512, kDepth = 256;  // of a weight gradient's task: rows of the result, inner dimension

// One block of a weight gradient [a, b]: rows a0.. of the result, all columns; the inner dimension is the expert's rows.
template <class C, class T, class Left, class Right>
void weight_gradient_block(
    const Left& left, const Right& right, const ExpertRows& of, int64_t a0, int64_t a_count, int64_t b, T* out) {
  using A = Acc<C>;
  constexpr int64_t wide = kColumns<C>;
  const int64_t stride = round_up(b, wide), deep = std::min(of.count(), kDepth);
  const bool one_step = of.count() <= kDepth;
  C* turned = scratch<C>(kLeft, panel_size<C>(deep) * (round_up(a_count, 32) / kRows));
  C* packed = scratch<C>(kRight, round_up(deep, kBlock<C>) * stride);
  A* product = scratch<A>(kOut, one_step ? 32 * stride : round_up(a_count, 32) * stride);
  for (int64_t r0 = of.begin; r0 < of.end; r0 += kDepth) {
    const int64_t r1 = std::min(r0 + kDepth, of.end), panel = panel_size<C>(r1 - r0);
    pack_left_transposed<C>(left, r0, r1, a0, a_count, turned);
    for (int64_t c = 0; c < b; c += wide)
      pack_right_rows<C>(right, r0, r1, c, std::min(wide, b - c), packed + c * round_up(r1 - r0, kBlock<C>));
    for (int64_t a = 0; a < a_count; a += 32) {  // row by row: the result is written in long runs
      const int64_t rows = std::min<int64_t>(32, a_count - a);
      A* tile = product + (one_step ? 0 : a * stride);
      for (int64_t c = 0; c < b; c += wide)
        multiply<C>(
            rows, turned + a / kRows * panel, panel, packed + c * round_up(r1 - r0, kBlock<C>),
            round_up(r1 - r0, kBlock<C>) / kUnit<C>, tile + c, stride, r0 > of.begin);
      if (r1 < of.end) continue;
      for (int64_t i = 0; i < rows; ++i) convert_past_caches(tile + i * stride, out + (a0 + a + i) * b, b);
    }
  }
}

// out[e] = left^T right over the expert's rows, [E, a, b] in the tensors' dtype; zeros for an expert without rows.
template <class C, class T, class Left, class Right>
void weight_gradient(const Routing& routing, const Left& left, const Right& right, int64_t a, int64_t b, T* out) {
  const int64_t blocks = (a + kLeftColumns - 1) / kLeftColumns;
  const int64_t num_experts = static_cast<int64_t>(routing.experts.size());
  std::vector<const ExpertRows*> order;
  for (const ExpertRows& of : routing.experts) order.push_back(&of);
  std::stable_sort(order.begin(), order.end(), [](auto* x, auto* y) { return x->count() > y->count(); });
  run_tasks(num_experts * blocks, [&](int64_t i) {
    const ExpertRows& of = *order[i / blocks];
    const int64_t a0 = i % blocks * kLeftColumns, a_count = std::min(kLeftColumns, a - a0);
    T* to = out + of.expert * a * b;
    if (of.count() == 0) std::fill(to + a0 * b, to + (a0 + a_count) * b, T(0.0f));
    else weight_gradient_block<C, T>(left, right, of, a0, a_count, b, to);
    finish_past_caches();
  });
}

// out[e] = sum over the expert's rows of weight * row, [E, b].
template <class C, class T, class Source>
void bias_gradient(const Routing& routing, const Source& rows, const Acc<C>* row_weight, int64_t b, T* out) {
  using A = Acc<C>;
  run_tasks(routing.experts.size(), [&](int64_t e) {
    const ExpertRows& of = routing.experts[e];
    for (int64_t c0 = 0; c0 < b; c0 += 16) {
      C run[16];
      A sum[16] = {};
      for (int64_t r = of.begin; r < of.end; ++r) {
        rows.read(r, c0, run);
        for (int c = 0; c < 16; ++c) sum[c] += (row_weight ? row_weight[r] : A(1)) * widen(run[c]);
      }
      convert(sum, out + e * b + c0, std::min<int64_t>(16, b - c0));
    }
  });
}

}  // namespace hf_moe
