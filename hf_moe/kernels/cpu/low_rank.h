// A low-rank term of the experts' products: rows times (wide x narrow)^T is computed as (rows times narrow^T) times wide^T.
//
// Shape suffixes: N sorted rows, E experts, R rank; k inner width of the rows, n columns of the product.
#pragma once

#include "multiply.h"
#include "routing.h"

namespace hf_moe {

// A factor [E, n, k] of every expert with rows, packed once as right operands. Rank is small, so this costs little, and
// what is multiplied then no longer depends on the factor's strides.
template <class C, class T>
class PackedFactor {
  static constexpr int64_t kWide = kColumns<C>, kDeep = 64, kTogether = 16;

 public:
  // Columns are packed in `parts` equal parts, each padded, so that every part begins with a panel.
  PackedFactor(const Routing& routing, const ExpertWeights<T>& factor, int64_t parts, const at::TensorOptions& options)
      : factor_(factor), parts_(parts), part_(factor.n / parts), depth_(round_up(factor.k, kBlock<C>)) {
    // PEFT keeps B as [n, R * E]: neighbouring values belong to different experts, which are packed together then
    const bool alternate = factor.e_step < factor.n_step && factor.e_step < factor.k_step;
    for (const ExpertRows* of : routing.active) {
      position_.resize(of->expert + 1);
      position_[of->expert] = static_cast<int64_t>(experts_.size());
      const bool together = alternate && !experts_.empty() && of->expert / kTogether == experts_.back() / kTogether;
      if (!together) groups_.push_back(position_[of->expert]);
      experts_.push_back(of->expert);
    }
    expert_size_ = parts * round_up(part_, kWide) * depth_;
    data_ = at::empty(
        {static_cast<int64_t>(experts_.size()) * expert_size_},
        options.dtype(c10::CppTypeToScalarType<C>::value));
  }

  int64_t num_tasks() const { return static_cast<int64_t>(groups_.size()); }
  void pack(int64_t task) const {
    const int64_t begin = groups_[task];
    const int64_t end = task + 1 < num_tasks() ? groups_[task + 1] : static_cast<int64_t>(experts_.size());
    for (int64_t p = 0; p < parts_; ++p) {
      if (end - begin > 1) pack_together(begin, end, p);
      else pack_weight<C>(factor_.of(experts_[begin], p * part_), part_, factor_.k, part_of(begin, p));
    }
  }

  int64_t columns() const { return factor_.n; }
  int64_t inner() const { return factor_.k; }
  int64_t units() const { return depth_ / kUnit<C>; }
  // The panel that begins with a column; columns count from their part's begin in steps of a panel.
  const C* panel(int64_t expert, int64_t column) const {
    const int64_t p = parts_ > 1 ? column / part_ : 0;
    return part_of(position_[expert], p) + (column - p * part_) * depth_;
  }

 private:
  C* part_of(int64_t position, int64_t p) const {
    return data_.template data_ptr<C>() + position * expert_size_ + p * round_up(part_, kWide) * depth_;
  }

  // Tile by tile, so that the lines in which these experts alternate are read once.
  void pack_together(int64_t begin, int64_t end, int64_t p) const {
    constexpr int64_t tile_size = kWide * kDeep;
    T* tile = scratch<T>(kLow, kTogether * tile_size);
    for (int64_t c = 0; c < part_; c += kWide) {
      const int64_t columns = std::min(kWide, part_ - c);
      for (int64_t k0 = 0; k0 < factor_.k; k0 += kDeep) {
        const int64_t deep = std::min(kDeep, factor_.k - k0);
        const Weight<T> from = factor_.of(0, p * part_ + c);
        for (int64_t n = 0; n < columns; ++n) {
          for (int64_t k = 0; k < deep; ++k) {
            const T* values = from.base + n * from.n_step + (k0 + k) * from.k_step;
            T* to = tile + n * kDeep + k;
            for (int64_t i = begin; i < end; ++i) to[(i - begin) * tile_size] = values[experts_[i] * factor_.e_step];
          }
        }
        for (int64_t i = begin; i < end; ++i)
          pack_weight<C>(
              Weight<T>{tile + (i - begin) * tile_size, kDeep, 1}, columns, deep,
              part_of(i, p) + c * depth_ + k0 * kWide);
      }
    }
  }

  ExpertWeights<T> factor_;
  int64_t parts_, part_, depth_, expert_size_;
  std::vector<int64_t> experts_, position_, groups_;  // with rows; expert to number among them; first numbers
  Tensor data_;
};

template <class C, class T>
class LowRankTerm {
  using A = Acc<C>;

 public:
  // `narrow` [E, R, k], `wide` [E, n, R]; `kept` [N, R] takes the scaled low-rank rows, if it is not null.
  LowRankTerm(
      const Routing& routing, const ExpertWeights<T>& narrow, const ExpertWeights<T>& wide, int64_t parts, double scale,
      T* kept, const at::TensorOptions& options)
      : routing_(&routing), narrow_(routing, narrow, 1, options), wide_(routing, wide, parts, options),
        panel_(panel_size<C>(narrow.n)), scale_(scale), kept_(kept) {
    low_ = at::empty(
        {panel_ * (routing.padded_rows / kRows)}, options.dtype(c10::CppTypeToScalarType<C>::value));
  }

  int64_t num_tasks() const { return narrow_.num_tasks() + wide_.num_tasks(); }
  void pack(int64_t task) const {
    task < narrow_.num_tasks() ? narrow_.pack(task) : wide_.pack(task - narrow_.num_tasks());
  }

  // The low-rank rows scale * rows times narrow^T of a task, from its rows as a left operand.
  void compute(const Task& task, const C* rows) const {
    constexpr int64_t wide = kColumns<C>;
    const int64_t rank = narrow_.columns(), stride = round_up(rank, wide);
    A* product = scratch<A>(kLow, round_up(task.rows, 32) * stride);
    for (int64_t c = 0; c < rank; c += wide)
      multiply<C>(
          task.rows, rows, panel_size<C>(narrow_.inner()), narrow_.panel(task.of->expert, c), narrow_.units(),
          product + c, stride, false);
    C* low = low_.template data_ptr<C>();
    const int64_t row0 = routing_->panel_row[task.first];
    for (int64_t r = 0; r < task.rows; ++r) {
      A* line = product + r * stride;
      for (int64_t c = 0; c < rank; ++c) line[c] *= scale_;
      write_row(line, rank, low, panel_, row0 + r);
      pad_row(low, panel_, row0 + r, rank);
      if (kept_) convert(line, kept_ + (task.first + r) * rank, rank);
    }
  }

  // product[rows padded to 16][columns] += low-rank rows from sorted row `first` times columns column.. of wide^T.
  void add(
      const ExpertRows& of, int64_t first, int64_t rows, int64_t column, int64_t columns, A* product,
      int64_t step) const {
    constexpr int64_t wide = kColumns<C>;
    const C* left = low_.template const_data_ptr<C>() + (of.padded + first - of.begin) / kRows * panel_;
    const C* right = wide_.panel(of.expert, column);
    for (int64_t c = 0; c < columns; c += wide)
      multiply<C>(rows, left, panel_, right + c * wide_.units() * kUnit<C>, wide_.units(), product + c, step, true);
  }

  PanelRows<C> rows() const { return {low_.template const_data_ptr<C>(), routing_->panel_row.data(), panel_}; }

 private:
  const Routing* routing_;
  PackedFactor<C, T> narrow_, wide_;
  int64_t panel_;
  A scale_;
  T* kept_;
  Tensor low_;
};

// Packs the factors of terms that need not exist (null).
template <class C, class T>
void pack_factors(const LowRankTerm<C, T>* first, const LowRankTerm<C, T>* second) {
  const int64_t count = first ? first->num_tasks() : 0;
  run_tasks(count + (second ? second->num_tasks() : 0), [&](int64_t i) {
    i < count ? first->pack(i) : second->pack(i - count);
  });
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
