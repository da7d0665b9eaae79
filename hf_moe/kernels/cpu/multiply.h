// The inner kernels: panels of rows times a panel of columns, and rows times weight rows without packing.
#pragma once

#include "panels.h"

#if defined(__AMX_BF16__) && NATIVE_BF16
#define MATRIX_UNIT 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define MATRIX_UNIT 0
#endif

namespace hf_moe {

template <class A>
INLINE Vec<A> multiply_add(Vec<A> sum, const A* left, Vec<A> right) {
  return sum + *left * right;
}
#if NATIVE_BF16
INLINE Vec<float> multiply_add(Vec<float> sum, const bf16* left, Vec<float> right) {
  int pair;
  std::memcpy(&pair, left, 4);
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)(__m512)right);
}
#endif

template <class C>
using Acc = typename accumulator<C>::type;

// Memory to fetch while multiplying: the weights that come next.
struct Ahead {
  const char* next = nullptr;
  int64_t lines = 0, per_step = 0;
  void spread(int64_t steps) { per_step = (lines + steps - 1) / std::max<int64_t>(steps, 1); }
  INLINE void step() {
    const int64_t count = std::min(per_step, lines);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(next + i * 64, 0, 2);
    next += count * 64;
    lines -= count;
  }
};

// A second pair of operands, whose product is added: a further inner dimension that lies elsewhere.
template <class C>
struct Second {
  const C *left = nullptr, *right = nullptr;
  int64_t panel = 0, units = 0;
  INLINE Second rows(int64_t r) const { return {left ? panel_run(left, panel, r, 0) : nullptr, right, panel, units}; }
};

// out[rows][kColumns] (+)= `rows` rows of a panel times a column panel, over `units` units.
template <class C, int rows>
void multiply_rows(
    const C* left, const C* right, int64_t units, Acc<C>* out, int64_t step, bool add, Ahead& ahead,
    const Second<C>& second) {
  using A = Acc<C>;
  constexpr int n = kColumns<C> / kLanes<A>;
  Vec<A> sum[rows][n];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) sum[i][j] = add ? load(out + i * step + j * kLanes<A>) : Vec<A>{};
  for (int64_t u0 = 0; u0 < units + second.units; u0 += kUnits, left += kRows * kBlock<C>) {
    ahead.step();
    if (u0 == units) left = second.left, right = second.right;
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u, right += kColumns<C> * kUnit<C>) {
      Vec<A> column[n];
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) std::memcpy(&column[j], right + j * kLanes<A> * kUnit<C>, sizeof(column[j]));
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j)
          sum[i][j] = multiply_add(sum[i][j], left + i * kBlock<C> + u * kUnit<C>, column[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) store(out + i * step + j * kLanes<A>, sum[i][j]);
}

// Rows of the register tile, which divide 16: few instructions beside the multiply-adds, and enough sums to hide their
// latency. One vector of columns times 16 rows takes each value of a row from memory in the multiply-add itself, and is
// 1.1 to 1.2 times as fast as two vectors times 8 rows (AVX512, float32).
template <class C>
constexpr int kTile = VECTOR_BYTES < 64 ? 4 : kColumns<C> / kLanes<Acc<C>> == 1 ? 16 : 8;

template <class C>
void multiply_tile(
    int64_t rows, const C* left, const C* right, int64_t units, Acc<C>* out, int64_t step, bool add, Ahead& ahead,
    const Second<C>& second) {
  if (rows >= kTile<C>) return multiply_rows<C, kTile<C>>(left, right, units, out, step, add, ahead, second);
  switch (rows) {
    case 1: return multiply_rows<C, 1>(left, right, units, out, step, add, ahead, second);
    case 2: return multiply_rows<C, 2>(left, right, units, out, step, add, ahead, second);
    case 3: return multiply_rows<C, 3>(left, right, units, out, step, add, ahead, second);
    case 4: return multiply_rows<C, 4>(left, right, units, out, step, add, ahead, second);
    case 5:
    case 6:
    case 7:
    case 8: return multiply_rows<C, 8>(left, right, units, out, step, add, ahead, second);
    default: return multiply_rows<C, kTile<C>>(left, right, units, out, step, add, ahead, second);
  }
}

#if MATRIX_UNIT
struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Linux gives a process the tile registers only when it asks.
inline bool matrix_unit_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// (GCC's tile macros do not put their arguments in parentheses.)
// 16 or 32 rows times 32 columns of bfloat16 in tile registers; writes whole panels of 16 rows.
template <bool two>
void multiply_tiles(
    const bf16* left, int64_t panel, const bf16* right, int64_t units, float* out, int64_t step, bool add,
    Ahead& ahead, const Second<bf16>& second) {
  const int64_t bytes = step * 4, column_bytes = kColumns<bf16> * 4;
  if (add) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, (out + 16), bytes);
    if (two) {
      _tile_loadd(2, (out + 16 * step), bytes);
      _tile_loadd(3, (out + 16 * step + 16), bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const int64_t all = units + second.units, block = kRows * kBlock<bf16>;
  for (int64_t u = 0; u < all; u += kUnits, left += block, right += kUnits * kColumns<bf16> * 2) {
    ahead.step();
    if (u == units) left = second.left, right = second.right, panel = second.panel;
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, column_bytes);
    _tile_loadd(7, (right + 32), column_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, (left + panel), 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, (out + 16), bytes);
  if (two) {
    _tile_stored(2, (out + 16 * step), bytes);
    _tile_stored(3, (out + 16 * step + 16), bytes);
  }
}
#endif

// out[rows padded to 16][kColumns] (+)= rows of a left operand times a column panel; `units` is a multiple of 16.
template <class C>
void multiply(
    int64_t rows, const C* left, int64_t panel, const C* right, int64_t units, Acc<C>* out, int64_t step, bool add,
    Ahead ahead = {}, const Second<C>& second = {}) {
#if MATRIX_UNIT
  if constexpr (std::is_same_v<C, bf16>) {
    if (matrix_unit_allowed()) {
      ahead.spread((rows + 31) / 32 * (units / kUnits));
      static const TileShape shape;
      asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
      _tile_loadconfig(&shape);
      for (int64_t r = 0; r < rows; r += 32, left += 2 * panel, out += 32 * step) {
        if (rows - r > 16) multiply_tiles<true>(left, panel, right, units, out, step, add, ahead, second.rows(r));
        else multiply_tiles<false>(left, panel, right, units, out, step, add, ahead, second.rows(r));
      }
      _tile_release();
      return;
    }
  }
#endif
  ahead.spread((rows + kTile<C> - 1) / kTile<C> * (units / kUnits));
  constexpr int64_t kDepth = 256;  // units of the column panel that stay in the first-level cache
  for (int64_t u = 0; u < units; u += kDepth) {
    const int64_t depth = std::min(kDepth, units - u);
    for (int64_t r = 0; r < rows; r += kTile<C>) {
      const C* from = panel_run(left, panel, r, u * kUnit<C>);
      const C* panel_part = right + u * kUnit<C> * kColumns<C>;
      const Second<C> last = u + depth == units ? second.rows(r) : Second<C>{};
      multiply_tile<C>(rows - r, from, panel_part, depth, out + r * step, step, add || u, ahead, last);
    }
  }
}

// Dot products without packing, for few rows and weights whose inner dimension is contiguous.

template <class C, class T>
INLINE Vec<Acc<C>> dot_step(Vec<Acc<C>> sum, const C* x, const T* w) {  // one vector of products
#if NATIVE_BF16
  if constexpr (std::is_same_v<C, bf16>) {
    return (Vec<float>)_mm512_dpbf16_ps(
        (__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
  }
#endif
  return sum + load_wide<Acc<C>>(x) * load_wide<Acc<C>>(w);
}

// The sum over the lanes of each of `count` vectors.
template <class A, int count>
INLINE void sum_lanes(const Vec<A>* v, A* sums) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {  // 16 vectors at a time: every step halves them
    __m512 t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) t[i] = i < count ? (__m512)v[i < count ? i : 0] : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      t[i] = _mm512_add_ps(_mm512_unpacklo_ps(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_ps(t[2 * i], t[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
      t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int n = 2; n >= 1; --n)
#pragma GCC unroll 2
      for (int i = 0; i < n; ++i)
        t[i] = _mm512_add_ps(
            _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88), _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
    _mm512_mask_storeu_ps(sums, static_cast<__mmask16>((1u << count) - 1), t[0]);
    return;
  }
#endif
  for (int n = 0; n < count; ++n) {
    sums[n] = 0;
    for (int i = 0; i < kLanes<A>; ++i) sums[n] += v[n][i];
  }
}

// out[m][n] for `rows` rows and `columns` weight rows; x holds block after block of all rows.
template <class C, class T, int rows, int columns>
void dot_tile(const C* x, const Weight<T>& w, int64_t k, Acc<C>* out, int64_t step) {
  using A = Acc<C>;
  constexpr int lanes = kLanes<A> * kUnit<C>;
  Vec<A> sum[rows][columns] = {};
  auto block = [&](const C* xs, const T* const* ws) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) __builtin_prefetch(ws[j] + columns * w.n_step, 0, 2);  // the next rows
#pragma GCC unroll 16
    for (int v = 0; v < kBlock<C>; v += lanes)
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j)
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) sum[i][j] = dot_step(sum[i][j], xs + i * kBlock<C> + v, ws[j] + v);
  };
  const T* from[columns];
  int64_t k0 = 0;
  for (; k0 + kBlock<C> <= k; k0 += kBlock<C>) {
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) from[j] = w.base + j * w.n_step + k0;
    block(x + k0 * rows, from);
  }
  if (k0 < k) {  // the row's padding is zero, but the weight's next values need not be finite
    T tail[columns][kBlock<C>] = {};
    for (int j = 0; j < columns; ++j) {
      std::copy(w.base + j * w.n_step + k0, w.base + j * w.n_step + k, tail[j]);
      from[j] = tail[j];
    }
    block(x + k0 * rows, from);
  }
  A sums[rows * columns];
  sum_lanes<A, rows * columns>(&sum[0][0], sums);
  for (int i = 0; i < rows; ++i) std::copy(sums + i * columns, sums + (i + 1) * columns, out + i * step);
}

// Each weight row is read once: as many rows at a time as there are, and so many columns that the sums fit registers.
// The rows are copied to lie close together, because panels of which half is used crowd the first-level cache.
template <class C, class T, int rows>
void dot_columns(
    const C* left, const Weight<T>& w, int64_t columns, int64_t k, Acc<C>* out, int64_t step, C* compact) {
  constexpr int at_once = rows <= 4 ? 4 : 2;
  for (int64_t k0 = 0; k0 < k; k0 += kBlock<C>)
    std::memcpy(compact + k0 * rows, left + k0 * kRows, rows * kBlock<C> * sizeof(C));
  int64_t c = 0;
  for (; c + at_once <= columns; c += at_once) dot_tile<C, T, rows, at_once>(compact, w.column(c), k, out + c, step);
  for (; c < columns; ++c) dot_tile<C, T, rows, 1>(compact, w.column(c), k, out + c, step);
}

constexpr int64_t kDotRows = 8;  // of one panel; rows that do not exist give sums that nobody reads

template <class C, class T>
void dot(
    int64_t rows, const C* left, const Weight<T>& w, int64_t columns, int64_t k, Acc<C>* out, int64_t step,
    C* compact) {
  switch (rows) {
    case 1: return dot_columns<C, T, 1>(left, w, columns, k, out, step, compact);
    case 2: return dot_columns<C, T, 2>(left, w, columns, k, out, step, compact);
    case 3: return dot_columns<C, T, 3>(left, w, columns, k, out, step, compact);
    case 4: return dot_columns<C, T, 4>(left, w, columns, k, out, step, compact);
    case 5:
    case 6: return dot_columns<C, T, 6>(left, w, columns, k, out, step, compact);
    default: return dot_columns<C, T, kDotRows>(left, w, columns, k, out, step, compact);
  }
}

}  // namespace hf_moe
