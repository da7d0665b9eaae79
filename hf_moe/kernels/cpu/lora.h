// Experts under low-rank adapters: weights up + scale * up_b up_a and down + scale * down_b down_a that never exist.
//
// Shape suffixes: T tokens, N sorted rows, E experts, H hidden, I width, P pre-activations, R rank.
#pragma once

#include "experts.h"

namespace hf_moe {

struct Factors {  // a [E, R, in] and b [E, out, R], any strides; both or none
  std::optional<Tensor> a, b;
  double scale;
};

struct NeededLoraGradients {
  bool hidden, weights, up_a, up_b, down_a, down_b;
};

// Low-rank rows as they were kept [N, R], times the routing weight.
template <class T, class C>
struct WeightedRows {
  GatheredRows<T, C> rows;
  const Acc<C>* row_weight;
  INLINE void read(int64_t row, int64_t column, C* to) const {
    rows.read(row, column, to);
    for (int i = 0; i < 16; ++i) to[i] = narrow<C>(row_weight[row] * widen(to[i]));
  }
};

constexpr int64_t kFactorColumns = 512;  // of a factor gradient's task

constexpr int64_t kOuterRows = 32;  // at a time, which are read along the columns

// out[rank j0..j0+count][kColumns] (+)= low[r][j] * rows[r][c] over rows r0..r1; nothing is packed.
template <class C, int count, class Rows>
void add_outer_products(
    const Acc<C>* low, int64_t low_step, const Rows& rows, int64_t r0, int64_t r1, int64_t column, bool whole,
    Acc<C>* out, int64_t step, bool add) {
  using A = Acc<C>;
  constexpr int lanes = kLanes<A>, n = kColumns<C> / lanes;
  Vec<A> sum[count][n];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) sum[i][j] = add ? load(out + i * step + j * lanes) : Vec<A>{};
  alignas(64) C part[kColumns<C>];
  for (int64_t r = r0; r < r1; ++r, low += low_step) {
    Vec<A> value[n];
    if (whole) {
      const auto* from = rows.at(r, column);
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) value[j] = load_wide<A>(from + j * lanes);
    } else {
      rows.read(r, column, part);
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) value[j] = load_wide<A>(part + j * lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) sum[i][j] += low[i] * value[j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) store(out + i * step + j * lanes, sum[i][j]);
}

// Columns c0..c0+count of product[R padded to 32][count padded] = low^T rows over an expert's rows.
template <class C, class Low, class Rows>
void factor_gradient_block(
    const Low& low, int64_t rank, const Rows& rows, const ExpertRows& of, int64_t c0, int64_t count, Acc<C>* product) {
  using A = Acc<C>;
  constexpr int64_t wide = kColumns<C>;
  const int64_t stride = round_up(count, wide);
  if constexpr (kUnit<C> == 1) {
    const int64_t low_step = round_up(rank, 16);
    A* dense = scratch<A>(kLeft, of.count() * low_step);
    for (int64_t r = 0; r < of.count(); ++r)
      for (int64_t j = 0; j < rank; j += 16) low.read(of.begin + r, j, dense + r * low_step + j);
    for (int64_t r0 = of.begin; r0 < of.end; r0 += kOuterRows) {
      const int64_t r1 = std::min(r0 + kOuterRows, of.end);
      for (int64_t r = r1; r < std::min(r1 + kOuterRows, of.end); ++r) rows.fetch(r, c0, count);
      for (int64_t c = 0; c < count; c += wide)
        for (int64_t j = 0; j < low_step; j += kTile<C>)
          add_outer_products<C, kTile<C>>(
              dense + (r0 - of.begin) * low_step + j, low_step, rows, r0, r1, c0 + c, count - c >= wide,
              product + j * stride + c, stride, r0 > of.begin);
    }
    return;
  }
  const int64_t deep = std::min(of.count(), kDepth);
  C* turned = scratch<C>(kLeft, panel_size<C>(deep) * (round_up(rank, 32) / kRows));
  C* packed = scratch<C>(kRight, round_up(deep, kBlock<C>) * wide);
  for (int64_t r0 = of.begin; r0 < of.end; r0 += kDepth) {
    const int64_t r1 = std::min(r0 + kDepth, of.end), units = round_up(r1 - r0, kBlock<C>) / kUnit<C>;
    pack_left_transposed<C>(low, r0, r1, 0, rank, turned);
    for (int64_t c = 0; c < count; c += wide) {
      pack_right_rows<C>(rows, r0, r1, c0 + c, std::min(wide, count - c), packed);
      multiply<C>(rank, turned, panel_size<C>(r1 - r0), packed, units, product + c, stride, r0 > of.begin);
    }
  }
}

// Writes columns c0.. of a gradient [R, n], or as [n, R].
template <class A, class T>
void write_factor_gradient(
    const A* product, int64_t stride, int64_t rank, int64_t c0, int64_t count, int64_t n, bool turned, T* out) {
  if (!turned) {
    for (int64_t j = 0; j < rank; ++j) convert(product + j * stride, out + j * n + c0, count);
    return;
  }
  using W = std::conditional_t<std::is_same_v<A, double>, double, uint32_t>;
  alignas(64) A block[16 * 16];
  for (int64_t c = 0; c < count; c += 16) {
    for (int64_t j = 0; j < rank; j += 16) {
      transpose_units(
          reinterpret_cast<const W*>(product + j * stride + c), stride, reinterpret_cast<W*>(block), 16);
      for (int64_t i = 0; i < std::min<int64_t>(16, count - c); ++i)
        convert(block + i * 16, out + (c0 + c + i) * rank + j, std::min<int64_t>(16, rank - j));
    }
  }
}

// out[e] = low^T rows over the expert's rows, [E, R, n], or turned [E, n, R]; zeros for an expert without rows.
template <class C, class T, class Low, class Rows>
void factor_gradient(
    const Routing& routing, const Low& low, int64_t rank, const Rows& rows, int64_t n, bool turned, T* out) {
  using A = Acc<C>;
  const int64_t blocks = (n + kFactorColumns - 1) / kFactorColumns;
  std::vector<const ExpertRows*> order;
  for (const ExpertRows& of : routing.experts) order.push_back(&of);
  std::stable_sort(order.begin(), order.end(), [](auto* x, auto* y) { return x->count() > y->count(); });
  run_tasks(order.size() * blocks, [&](int64_t i) {
    const ExpertRows& of = *order[i / blocks];
    const int64_t c0 = i % blocks * kFactorColumns, count = std::min(kFactorColumns, n - c0);
    T* to = out + of.expert * rank * n;
    if (of.count() == 0) {
      if (c0 == 0) std::fill_n(to, rank * n, T(0.0f));
      return;
    }
    const int64_t stride = round_up(count, kColumns<C>);
    A* product = scratch<A>(kOut, round_up(rank, 32) * stride);
    factor_gradient_block<C>(low, rank, rows, of, c0, count, product);
    write_factor_gradient(product, stride, rank, c0, count, n, turned, to);
  });
}

template <class T>
class LoraExperts : Experts<T> {
  using Base = Experts<T>;
  using typename Base::A;
  using typename Base::C;
  using typename Base::Term;

 public:
  LoraExperts(const ExpertsArguments& given, const Factors& up, const Factors& down)
      : Base(given), adapter_up_(up), adapter_down_(down), rows_(this->routing_.rows()) {
    for (size_t n = 0; n < rows_.size(); ++n) rows_[n] = static_cast<int64_t>(n);
  }

  // out [T, H] and, if kept, the pre-activations [N, P] and the scaled low-rank rows [N, R] of up and down.
  std::tuple<Tensor, Tensor, Tensor, Tensor> forward(bool keep) const {
    const Tensor up_low = this->kept_rows(keep && adapter_up_.a ? adapter_up_.a->size(1) : 0);
    const Tensor down_low = this->kept_rows(keep && adapter_down_.a ? adapter_down_.a->size(1) : 0);
    const std::optional<Term> up = forward_term(adapter_up_, up_low);
    const std::optional<Term> down = forward_term(adapter_down_, down_low);
    prepare(up, down);
    auto [out, pre] = Base::forward(keep, pointer(up), pointer(down));
    return {out, pre, up_low, down_low};
  }

  // Gradients of hidden, weights, up_a, up_b, down_a, down_b; empty where not needed.
  std::vector<Tensor> backward(
      const Tensor& grad_TH, const Tensor& pre, const Tensor& up_low, const Tensor& down_low,
      const NeededLoraGradients& need) const {
    const auto& given = this->given_;
    const bool need_pre = need.hidden || need.up_a || need.up_b, need_d_act = need_pre || need.weights;
    const Tensor d_pre = this->left_operand(need_pre ? this->up_.n : 0);
    const Tensor act = this->left_operand(need.down_a ? this->width_ : 0);
    const std::optional<Term> down = backward_term(adapter_down_, need_d_act || need.down_a);
    const std::optional<Term> up = backward_term(adapter_up_, need.hidden || need.up_a);
    prepare(down, up);
    const Tensor d_weights = this->activate_backward(
        grad_TH.const_data_ptr<T>(), pre.const_data_ptr<T>(), need_pre ? d_pre.data_ptr<C>() : nullptr,
        need.down_a ? act.data_ptr<C>() : nullptr, need_d_act, need.weights, pointer(down), pointer(up));
    std::vector<Tensor> out;
    for (int i = 0; i < 6; ++i) out.push_back(at::empty({0}, given.hidden_TH.options()));
    if (need.hidden) out[0] = this->hidden_gradient(d_pre.const_data_ptr<C>(), pointer(up));
    if (need.weights) out[1] = d_weights.to(given.weights_TK.scalar_type());
    if (need.up_a) out[2] = gradient(adapter_up_.a, up->rows(), gathered(given.hidden_TH), false);
    if (need.up_b) out[3] = gradient(adapter_up_.b, kept(up_low), this->panel_rows(d_pre, this->up_.n), true);
    if (need.down_a) out[4] = gradient(adapter_down_.a, down->rows(), this->panel_rows(act, this->width_), false);
    if (need.down_b) {
      const WeightedRows<T, C> low{kept(down_low), this->row_weight_.data()};
      out[5] = gradient(adapter_down_.b, low, gathered(grad_TH), true);
    }
    return out;
  }

 private:

  std::optional<Term> forward_term(const Factors& f, const Tensor& kept) const {
    if (!f.a) return std::nullopt;
    T* to = kept.numel() ? kept.data_ptr<T>() : nullptr;
    return Term(
        this->routing_, Factor<T>(*f.a, false, true), Factor<T>(*f.b, false, false), f.scale, to, kept.options());
  }
  std::optional<Term> backward_term(const Factors& f, bool needed) const {
    if (!f.a || !needed) return std::nullopt;
    return Term(
        this->routing_, Factor<T>(*f.b, true, true), Factor<T>(*f.a, true, false), f.scale, nullptr, f.a->options());
  }
  void prepare(const std::optional<Term>& first, const std::optional<Term>& second) const {
    std::vector<const Factor<T>*> factors;
    for (const std::optional<Term>* term : {&first, &second})
      if (*term) factors.insert(factors.end(), {&(*term)->narrow(), &(*term)->wide()});
    take_apart(this->routing_, factors);
  }

  GatheredRows<T, C> gathered(const Tensor& rows_TH) const {
    return {rows_TH.const_data_ptr<T>(), this->routing_.token.data(), this->hidden_, this->hidden_};
  }
  GatheredRows<T, C> kept(const Tensor& low_NR) const {
    return {low_NR.const_data_ptr<T>(), rows_.data(), low_NR.size(1), low_NR.size(1)};
  }

  // Gradient of a factor a [E, R, n], or turned of b [E, n, R].
  template <class Low, class Rows>
  Tensor gradient(const std::optional<Tensor>& factor, const Low& low, const Rows& rows, bool turned) const {
    Tensor out = fresh(factor->sizes(), factor->options());
    const int64_t rank = factor->size(turned ? 2 : 1), n = factor->size(turned ? 1 : 2);
    factor_gradient<C, T>(this->routing_, low, rank, rows, n, turned, out.data_ptr<T>());
    return out;
  }

  Factors adapter_up_, adapter_down_;
  std::vector<int64_t> rows_;  // 0, 1, ...: kept rows are in their order already
};

}  // namespace hf_moe
