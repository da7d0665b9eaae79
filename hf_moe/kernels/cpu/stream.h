// Few rows times weights whose columns are contiguous: read once in long runs, without packing.
#pragma once

#include "multiply.h"

namespace hf_moe {

constexpr int kDeep = 4;  // weight rows at a time, so that a sum is loaded and stored once for four products

// out[rows][columns] += values of `rows` rows at k0..k0+deep times these weight rows.
template <class C, class T, int rows, int deep>
void add_weight_rows(const C* left, const Weight<T>& w, int64_t columns, int64_t k0, Acc<C>* out, int64_t step) {
  using A = Acc<C>;
  A value[rows][deep];
  const T* from[deep];
  for (int d = 0; d < deep; ++d) {
    from[d] = w.base + (k0 + d) * w.k_step;
    for (int i = 0; i < rows; ++i) value[i][d] = widen(*panel_run(left, 0, i, k0 + d));
  }
  int64_t c = 0;
  for (; c + kLanes<A> <= columns; c += kLanes<A>) {
    Vec<A> weight[deep];
#pragma GCC unroll 4
    for (int d = 0; d < deep; ++d) {
      __builtin_prefetch(from[d] + kDeep * w.k_step + c, 0, 2);
      weight[d] = load_wide<A>(from[d] + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      Vec<A> sum = load(out + i * step + c);
#pragma GCC unroll 4
      for (int d = 0; d < deep; ++d) sum += value[i][d] * weight[d];
      store(out + i * step + c, sum);
    }
  }
  for (; c < columns; ++c)
    for (int i = 0; i < rows; ++i)
      for (int d = 0; d < deep; ++d) out[i * step + c] += value[i][d] * widen(from[d][c]);
}

template <class C, class T, int rows>
void stream_rows(const C* left, const Weight<T>& w, int64_t columns, int64_t k, Acc<C>* out, int64_t step) {
  for (int i = 0; i < rows; ++i) std::fill_n(out + i * step, columns, Acc<C>(0));
  int64_t k0 = 0;
  for (; k0 + kDeep <= k; k0 += kDeep) add_weight_rows<C, T, rows, kDeep>(left, w, columns, k0, out, step);
  for (; k0 < k; ++k0) add_weight_rows<C, T, rows, 1>(left, w, columns, k0, out, step);
}

// Up to this many rows; from here on packing pays. Measured on two cores with AVX512 and a matrix unit, 16 of 64 weights
// [1024, 1024] from memory, GB/s of weights streamed / packed: float32 8 rows 20 / 9, 16 rows 17 / 9; bfloat16 8 rows
// 16 / 14, 16 rows 5 / 13.
template <class C>
constexpr int64_t kStreamedRows = std::is_same_v<C, bf16> ? 8 : 16;

// out[rows padded to 16][columns] = up to 16 rows of the first panel of a left operand times the weight.
template <class C, class T>
void stream(int64_t rows, const C* left, const Weight<T>& w, int64_t columns, int64_t k, Acc<C>* out, int64_t step) {
  if (rows > 12) return stream_rows<C, T, 16>(left, w, columns, k, out, step);
  if (rows > 8) return stream_rows<C, T, 12>(left, w, columns, k, out, step);
  if (rows > 6) return stream_rows<C, T, 8>(left, w, columns, k, out, step);
  if (rows > 4) return stream_rows<C, T, 6>(left, w, columns, k, out, step);
  if (rows == 4) return stream_rows<C, T, 4>(left, w, columns, k, out, step);
  if (rows == 3) return stream_rows<C, T, 3>(left, w, columns, k, out, step);
  if (rows == 2) return stream_rows<C, T, 2>(left, w, columns, k, out, step);
  return stream_rows<C, T, 1>(left, w, columns, k, out, step);
}

}  // namespace hf_moe
