// The phases that experts and grouped linears are made of. Shape suffixes: T tokens, N sorted rows, E experts.
#pragma once

#include "multiply.h"
#include "routing.h"

namespace hf_moe {

enum Slot { kLeft, kRight, kOut, kSum, kLine, kBig };

// Up to this many rows of an expert its weights are read as they lie; from here on packing them pays.
template <class C>
constexpr int64_t kFewRows = 4;

// A weight [E, n, k] (or [E, k, n]) as strides in elements.
template <class T>
struct ExpertWeights {
  const T* base;
  int64_t e_step, n_step, k_step, n, k;
  Weight<T> of(int64_t expert, int64_t column = 0) const {
    return {base + expert * e_step + column * n_step, n_step, k_step};
  }
  ExpertWeights swapped() const { return {base, e_step, k_step, n_step, k, n}; }
};

template <class T>
ExpertWeights<T> weights_of(const Tensor& w, bool transposed) {
  const int n = transposed ? 2 : 1, k = transposed ? 1 : 2;
  return {w.const_data_ptr<T>(), w.stride(0), w.stride(n), w.stride(k), w.size(n), w.size(k)};
}

// Some columns of an expert's weight, ready to multiply `rows` rows or more, panel by panel.
template <class C, class T>
class Columns {
 public:
  using A = Acc<C>;
  static constexpr int64_t kWide = kColumns<A>;

  // How many columns to take at once: more than a panel where that makes the runs of memory longer.
  static int64_t at_once(const ExpertWeights<T>& weights) {
    return weights.n_step == 1 && weights.k_step != 1 ? std::max<int64_t>(kWide, 512 / sizeof(T)) : kWide;
  }
  static int64_t packed_size(int64_t columns, int64_t k) {
    return round_up(k, kBlock<C>) * round_up(columns, kWide);
  }
  Columns(const Weight<T>& weight, int64_t columns, int64_t k, int64_t rows, C* packed)
      : weight_(weight), columns_(columns), k_(k), packed_(packed), few_(weight.k_step == 1 && rows <= kFewRows<C>) {
    if (!few_) pack_weight<C, A>(weight, columns, k, packed);
  }
  // out[rows padded to 16][kWide] = rows times columns c..; columns that do not exist are left alone or zero.
  // `next` are the weights needed soon.
  void times(int64_t c, int64_t rows, const C* left, A* out, int64_t step, const Weight<T>* next = nullptr) const {
    const int64_t panel = panel_size<C>(k_);
    if (few_) return dot<C, T>(rows, left, panel, weight_.column(c), std::min(kWide, columns_ - c), k_, out, step);
    Ahead ahead;
    if (next && next->k_step == 1) {
      ahead = {reinterpret_cast<const char*>(next->base), static_cast<int64_t>(kWide * next->n_step * sizeof(T) / 64), 0};
    }
    const C* packed = packed_ + packed_size(c, k_);
    multiply<C>(rows, left, panel, packed, round_up(k_, kBlock<C>) / kUnit<C>, out, step, false, ahead);
  }

 private:
  Weight<T> weight_;
  int64_t columns_, k_;
  C* packed_;
  bool few_;
};

template <class A, class T>
void add_bias(const T* bias, int64_t columns, int64_t rows, A* product, int64_t step) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) product[r * step + c] += widen(bias[c]);
}

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

// out[t] = sum over the token's rows, experts ascending, of row_weight * (row of `left` times the expert's weight
// + bias). A task owns columns of `out`, so that no two threads add to one value and the order is always the same.
template <class C, class T>
void sum_over_experts(
    const Routing& routing, const C* left, const ExpertWeights<T>& weights, const T* bias, const Acc<C>* row_weight,
    int64_t num_tokens, T* out) {
  using A = Acc<C>;
  constexpr int64_t wide = kColumns<A>;
  const int64_t share = round_up((weights.n + 4 * at::get_num_threads() - 1) / (4 * at::get_num_threads()), wide);
  const int64_t width = std::min(Columns<C, T>::at_once(weights), share), panel = panel_size<C>(weights.k);
  run_tasks((weights.n + width - 1) / width, [&](int64_t i) {
    const int64_t c0 = i * width, columns = std::min(width, weights.n - c0), stride = round_up(columns, wide);
    A* sum = scratch<A>(kSum, num_tokens * stride);
    A* product = scratch<A>(kOut, (kRowsPerTask + 32) * wide);
    C* packed = scratch<C>(kRight, Columns<C, T>::packed_size(columns, weights.k));
    std::fill(sum, sum + num_tokens * stride, A(0));
    for (size_t a = 0; a < routing.active.size(); ++a) {
      const ExpertRows& of = *routing.active[a];
      const Columns<C, T> panels(weights.of(of.expert, c0), columns, weights.k, of.count(), packed);
      const bool more = a + 1 < routing.active.size();
      const Weight<T> next = weights.of(more ? routing.active[a + 1]->expert : of.expert, c0);
      for (int64_t first = of.begin; first < of.end; first += kRowsPerTask) {
        const int64_t rows = std::min(kRowsPerTask, of.end - first);
        const C* from = left + (of.padded + first - of.begin) / kRows * panel;
        for (int64_t c = 0; c < columns; c += wide) {
          panels.times(c, rows, from, product, wide, more && first == of.begin ? &next : nullptr);
          const int64_t count = std::min(wide, columns - c);
          if (bias) add_bias(bias + of.expert * weights.n + c0 + c, count, rows, product, wide);
          for (int64_t r = 0; r < rows; ++r) {
            const A weight = row_weight ? row_weight[first + r] : A(1);
            A* to = sum + routing.token[first + r] * stride + c;
            for (int64_t j = 0; j < wide; ++j) to[j] += weight * product[r * wide + j];
          }
        }
      }
    }
    for (int64_t t = 0; t < num_tokens; ++t) convert(sum + t * stride, out + t * weights.n + c0, columns);
  });
}

constexpr int64_t kLeftColumns = 256, kDepth = 256;  // of a weight gradient's task: rows of the result, inner dimension

// One block of a weight gradient [a, b]: rows a0.. of the result, all columns; the inner dimension is the expert's rows.
template <class C, class T, class Left, class Right>
void weight_gradient_block(
    const Left& left, const Right& right, const ExpertRows& of, int64_t a0, int64_t a_count, int64_t b, T* out) {
  using A = Acc<C>;
  constexpr int64_t wide = kColumns<A>;
  const int64_t stride = round_up(b, wide), deep = std::min(of.count(), kDepth);
  const bool one_step = of.count() <= kDepth;
  C* turned = scratch<C>(kLeft, panel_size<C>(deep) * (round_up(a_count, 32) / kRows));
  C* packed = scratch<C>(kRight, round_up(deep, kBlock<C>) * stride);
  A* product = scratch<A>(kOut, one_step ? 32 * stride : round_up(a_count, 32) * stride);
  for (int64_t r0 = of.begin; r0 < of.end; r0 += kDepth) {
    const int64_t r1 = std::min(r0 + kDepth, of.end), panel = panel_size<C>(r1 - r0);
    pack_left_transposed<C>(left, r0, r1, a0, a_count, turned);
    for (int64_t c = 0; c < b; c += wide)
      pack_right_rows<C, A>(right, r0, r1, c, std::min(wide, b - c), packed + c * round_up(r1 - r0, kBlock<C>));
    for (int64_t a = 0; a < a_count; a += 32) {  // row by row: the result is written in long runs
      const int64_t rows = std::min<int64_t>(32, a_count - a);
      A* tile = product + (one_step ? 0 : a * stride);
      for (int64_t c = 0; c < b; c += wide)
        multiply<C>(
            rows, turned + a / kRows * panel, panel, packed + c * round_up(r1 - r0, kBlock<C>),
            round_up(r1 - r0, kBlock<C>) / kUnit<C>, tile + c, stride, r0 > of.begin);
      if (r1 < of.end) continue;
      for (int64_t i = 0; i < rows; ++i) convert(tile + i * stride, out + (a0 + a + i) * b, b);
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
