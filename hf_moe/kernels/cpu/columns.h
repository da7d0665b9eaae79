// Rows times columns of a weight, by the kernel that fits how many rows there are and how the weight lies.
#pragma once

#include "multiply.h"
#include "routing.h"
#include "stream.h"

namespace hf_moe {

// Up to this many rows of an expert its weights are read once, as they lie; from here on packing them pays. Measured on
// two cores with AVX512 and a matrix unit, weights [64, 1024, 1024] from memory, GB/s of weights as they lie / packed (a
// plain read: 22 to 26). float32: 2 rows 25 / 15, 4 rows 22 / 14, 8 rows 22 / 13. bfloat16: 2 rows 23 / 14, 4 rows
// 18 / 15, 8 rows 17 / 15; further rows cost the matrix unit next to nothing.
template <class C>
constexpr int64_t kFewRows = std::is_same_v<C, bf16> ? 8 : 16;

// How many columns to multiply at once, so that memory is read in long runs: 32 where the inner dimension is contiguous,
// 2 KiB where the columns are.
template <class C, class T>
int64_t columns_at_once(const ExpertWeights<T>& weights) {
  const bool by_columns = weights.n_step == 1 && weights.k_step != 1;
  return by_columns ? 2048 / sizeof(T) : 32;
}

// Low-rank rows as a left operand, and the weight [n, R] they are multiplied with, from the column at hand.
template <class C, class T>
struct LowColumns {
  const C* left;
  Weight<T> weight;
  int64_t rank;
  int64_t depth() const { return round_up(rank, kBlock<C>); }
};

// out[rows padded to 16][columns padded to kColumns] += low-rank rows times the weight.
template <class C, class T>
void add_low(const LowColumns<C, T>& low, int64_t columns, int64_t rows, Acc<C>* out, int64_t step) {
  constexpr int64_t wide = kColumns<C>;
  C* packed = scratch<C>(kLow, low.depth() * round_up(columns, wide));
  pack_weight<C>(low.weight, columns, low.rank, packed);
  for (int64_t c = 0; c < columns; c += wide)
    multiply<C>(
        rows, low.left, panel_size<C>(low.rank), packed + c * low.depth(), low.depth() / kUnit<C>, out + c, step, true);
}

// out[rows padded to 16][columns padded to kColumns] = rows of a left operand times columns 0.. of a weight. Columns
// that do not exist are zero or left alone. `next` are the weights needed soon; `low` is a
// low-rank term that is added.
template <class C, class T>
void multiply_columns(
    const Weight<T>& weight, int64_t columns, int64_t k, int64_t rows, const C* left, Acc<C>* out, int64_t step,
    const Weight<T>* next = nullptr, const LowColumns<C, T>* low = nullptr) {
  constexpr int64_t wide = kColumns<C>;
  const int64_t panel = panel_size<C>(k);
  if (weight.k_step == 1 && rows <= kFewRows<C>) {
    C* compact = scratch<C>(kRight, kDotRows * round_up(k, kBlock<C>));
    for (int64_t r = 0; r < rows; r += kDotRows)
      dot<C, T>(rows - r, panel_run(left, panel, r, 0), weight, columns, k, out + r * step, step, compact);
    if (low) add_low(*low, columns, rows, out, step);
    return;
  }
  if (weight.n_step == 1 && weight.k_step != 1 && rows <= kStreamedRows<C>) {
    stream<C, T>(rows, left, weight, columns, k, out, step);
    if (low) add_low(*low, columns, rows, out, step);
    return;
  }
  if constexpr (std::is_same_v<C, T> && kUnit<C> == 1) {  // it lies as if packed
    if (weight.n_step == 1 && weight.k_step == wide && columns == wide && k % kBlock<C> == 0 && !low)
      return multiply<C>(rows, left, panel, weight.base, k, out, step, false);
  }
  // where columns are contiguous, some rows of all of them at a time: what is packed stays in the second-level cache
  const int64_t depth = weight.k_step == 1 ? round_up(k, kBlock<C>) : 256;
  C* packed = scratch<C>(kRight, depth * round_up(columns, wide));
  Ahead ahead;
  if (next && next->k_step == 1) {
    ahead = {reinterpret_cast<const char*>(next->base), static_cast<int64_t>(wide * next->n_step * sizeof(T) / 64), 0};
  }
  C* packed_low = low ? scratch<C>(kLow, low->depth() * round_up(columns, wide)) : nullptr;
  if (low) pack_weight<C>(low->weight, columns, low->rank, packed_low);
  for (int64_t k0 = 0; k0 < k; k0 += depth) {
    const int64_t deep = std::min(depth, k - k0), padded = round_up(deep, kBlock<C>);
    pack_weight<C>(Weight<T>{weight.base + k0 * weight.k_step, weight.n_step, weight.k_step}, columns, deep, packed);
    for (int64_t c = 0; c < columns; c += wide) {
      Second<C> second;
      if (low && k0 + deep == k)
        second = {low->left, packed_low + c * low->depth(), panel_size<C>(low->rank), low->depth() / kUnit<C>};
      multiply<C>(
          rows, left + k0 * kRows, panel, packed + c * padded, padded / kUnit<C>, out + c, step, k0 > 0,
          c ? Ahead{} : ahead, second);
    }
  }
}

}  // namespace hf_moe
