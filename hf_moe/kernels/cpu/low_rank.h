// A low-rank term of the experts' products: rows (wide x narrow)^T is computed as (rows x narrow^T) wide^T.
//
// Shape suffixes: N sorted rows, E experts, R rank; k inner width of the rows, n columns of the product.
#pragma once

#include "columns.h"

#include <optional>

namespace hf_moe {

// to[expert][i] = values of 16 neighbouring experts at from + i * step, for `count` of 16 i; `experts` of them exist.
template <class T>
void turn_experts(const T* from, int64_t step, int64_t count, int64_t experts, T* to) {
  using W = std::conditional_t<sizeof(T) == 8, double, uint32_t>;
  if constexpr (sizeof(T) == sizeof(W)) {
    if (count == 16 && experts == 16)
      return transpose_units(reinterpret_cast<const W*>(from), step, reinterpret_cast<W*>(to), 16);
  }
  alignas(64) W lines[16 * 16] = {}, turned[16 * 16];
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == sizeof(W)) {
      std::memcpy(lines + 16 * i, from + i * step, experts * sizeof(T));
    } else {
      uint16_t line[16];
      std::memcpy(line, from + i * step, experts * sizeof(T));
      for (int e = 0; e < 16; ++e) lines[16 * i + e] = line[e];
    }
  }
  transpose_units(lines, 16, turned, 16);
  for (int i = 0; i < 16 * 16; ++i) {
    if constexpr (sizeof(T) == sizeof(W)) std::memcpy(to + i, turned + i, sizeof(T));
    else reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(turned[i]);
  }
}

// A factor of a low-rank term, [E, n, k] or, by its strides, [E, k, n].
template <class T>
class Factor {
  static constexpr int64_t kTogether = 16, kPerTask = 64;

 public:
  // `long_k`: whether k and not n is the long one of the two, the other being the rank.
  Factor(const Tensor& factor, bool transposed, bool long_k)
      : given_(weights_of<T>(factor, transposed)), weights_(given_), long_k_(long_k) {
    // PEFT keeps b as [n, R * E]: neighbouring values belong to different experts, and are taken apart first
    if (given_.e_step != 1 || given_.n_step == 1 || given_.k_step == 1) return;
    const int64_t experts = factor.size(0), rank = long_k ? given_.n : given_.k, wide = long_k ? given_.k : given_.n;
    apart_ = at::empty({experts, wide, rank}, factor.options());
    weights_ = weights_of<T>(*apart_, long_k);
  }

  const ExpertWeights<T>& weights() const { return weights_; }
  int64_t num_tasks() const { return apart_ ? (apart_->size(1) + kPerTask - 1) / kPerTask : 0; }

  // Takes the experts with rows apart, for some of the long dimension; in the order in which memory is read.
  void take_apart(const Routing& routing, int64_t task) const {
    const int64_t end = std::min(apart_->size(1), (task + 1) * kPerTask);
    for (int64_t i = task * kPerTask; i < end; ++i)
      for (size_t a = 0; a < routing.active.size();) {
        const size_t begin = a;
        const int64_t first = routing.active[a]->expert / kTogether * kTogether;
        while (a < routing.active.size() && routing.active[a]->expert < first + kTogether) ++a;
        for (int64_t r = 0; r < apart_->size(2); r += 16) turn_tile(&routing.active[begin], a - begin, first, i, r);
      }
  }

 private:
  // The values at i and up to 16 ranks from r on, of some of the 16 experts from `first` on.
  INLINE void turn_tile(
      const ExpertRows* const* active, int64_t num_active, int64_t first, int64_t i, int64_t r) const {
    const int64_t rank = apart_->size(2), size = apart_->size(1) * rank, count = std::min<int64_t>(16, rank - r);
    const int64_t step = long_k_ ? given_.n_step : given_.k_step;
    const T* from = given_.base + first + i * (long_k_ ? given_.k_step : given_.n_step) + r * step;
    T* to = apart_->template data_ptr<T>() + i * rank + r;
    if (num_active < 4) {
      for (int64_t a = 0; a < num_active; ++a) {
        const int64_t e = active[a]->expert;
        for (int64_t c = 0; c < count; ++c) to[e * size + c] = from[c * step + e - first];
      }
      return;
    }
    alignas(64) T turned[kTogether * 16];
    turn_experts(from, step, count, std::min(kTogether, apart_->size(0) - first), turned);
    for (int64_t a = 0; a < num_active; ++a) {
      const int64_t e = active[a]->expert;
      std::memcpy(to + e * size, turned + (e - first) * 16, count * sizeof(T));
    }
  }

  ExpertWeights<T> given_, weights_;
  bool long_k_;
  std::optional<Tensor> apart_;  // [E, n or k, R]
};

template <class C, class T>
class LowRankTerm {
  using A = Acc<C>;

 public:
  // `narrow` [E, R, k], `wide` [E, n, R]; `kept` [N, R] takes the scaled low-rank rows, if it is not null.
  LowRankTerm(
      const Routing& routing, const Factor<T>& narrow, const Factor<T>& wide, double scale, T* kept,
      const at::TensorOptions& options)
      : routing_(&routing), narrow_(narrow), wide_(wide), rank_(narrow.weights().n), panel_(panel_size<C>(rank_)),
        scale_(static_cast<A>(scale)), kept_(kept) {
    low_ = at::empty(
        {panel_ * (routing.padded_rows / kRows)}, options.dtype(c10::CppTypeToScalarType<C>::value));
  }

  const Factor<T>& narrow() const { return narrow_; }
  const Factor<T>& wide() const { return wide_; }

  // The low-rank rows scale * rows narrow^T of a task, from its rows as a left operand.
  void compute(const Task& task, const C* rows) const {
    const ExpertWeights<T>& narrow = narrow_.weights();
    const int64_t stride = round_up(rank_, kColumns<C>), row0 = routing_->panel_row[task.first];
    A* product = scratch<A>(kLow, round_up(task.rows, 32) * stride);
    multiply_columns<C, T>(narrow.of(task.of->expert), rank_, narrow.k, task.rows, rows, product, stride);
    C* low = low_.template data_ptr<C>();
    for (int64_t r = 0; r < task.rows; ++r) {
      A* line = product + r * stride;
      for (int64_t c = 0; c < rank_; ++c) line[c] *= scale_;
      write_row(line, rank_, low, panel_, row0 + r);
      pad_row(low, panel_, row0 + r, rank_);
      if (kept_) convert(line, kept_ + (task.first + r) * rank_, rank_);
    }
  }

  // What is added to columns column.. of the product of an expert's rows from sorted row `first` on.
  LowColumns<C, T> columns(const ExpertRows& of, int64_t first, int64_t column) const {
    const C* left = low_.template const_data_ptr<C>() + (of.padded + first - of.begin) / kRows * panel_;
    return {left, wide_.weights().of(of.expert, column), rank_};
  }

  PanelRows<C> rows() const { return {low_.template const_data_ptr<C>(), routing_->panel_row.data(), panel_}; }

 private:
  const Routing* routing_;
  Factor<T> narrow_, wide_;
  int64_t rank_, panel_;
  A scale_;
  T* kept_;
  Tensor low_;
};

// The same of a term that need not exist (null).
template <class C, class T>
std::optional<LowColumns<C, T>> columns_of(
    const LowRankTerm<C, T>* term, const ExpertRows& of, int64_t first, int64_t column) {
  return term ? std::optional(term->columns(of, first, column)) : std::nullopt;
}
template <class X>
const X* pointer(const std::optional<X>& value) {
  return value ? &*value : nullptr;
}

// Takes apart the factors that need it.
template <class T>
void take_apart(const Routing& routing, const std::vector<const Factor<T>*>& factors) {
  std::vector<std::pair<const Factor<T>*, int64_t>> tasks;
  for (const Factor<T>* factor : factors)
    for (int64_t i = 0; i < factor->num_tasks(); ++i) tasks.emplace_back(factor, i);
  run_tasks(tasks.size(), [&](int64_t i) { tasks[i].first->take_apart(routing, tasks[i].second); });
}

// Low-rank rows that several tasks need, because each has some of the columns; `rows_of(task)` is a left operand.
template <class C, class T, class F>
void compute_shared(const LowRankTerm<C, T>* term, const std::vector<Task>& tasks, int64_t chunks, const F& rows_of) {
  if (!term || chunks == 1) return;
  run_tasks(tasks.size(), [&](int64_t i) {
    if (tasks[i].chunk == 0) term->compute(tasks[i], rows_of(tasks[i]));
  });
}

}  // namespace hf_moe
