// How operands lie in memory while they are multiplied.
//
// Left operand ("rows"): panels of 16 rows; inside, blocks of 64 bytes (128 in float64) of each of the 16 rows, so that
// one block is a matrix-unit tile and 16 rows of any kernel are one stream. Rows and blocks are padded.
// Right operand ("columns"): panels of kColumns output columns; unit k of every column, then unit k+1.
#pragma once

#include "vectors.h"

#include <algorithm>

namespace hf_moe {

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Elements from one panel of 16 rows to the next, for rows of `k` values.
template <class C>
INLINE int64_t panel_size(int64_t k) {
  return round_up(k, kBlock<C>) * kRows;
}
template <class E>
INLINE E* panel_run(E* rows, int64_t panel, int64_t row, int64_t k) {  // where values k.. of a row lie, to the block's end
  constexpr int64_t block = kBlock<std::remove_const_t<E>>;
  return rows + row / kRows * panel + k / block * (kRows * block) + row % kRows * block + k % block;
}

// Writes `n` values at position k0 of a row of a left operand.
template <class From, class C>
INLINE void write_row(const From* from, int64_t n, C* rows, int64_t panel, int64_t row, int64_t k0 = 0) {
  for (int64_t k = 0; k < n;) {
    const int64_t count = std::min(kBlock<C> - (k0 + k) % kBlock<C>, n - k);
    convert(from + k, panel_run(rows, panel, row, k0 + k), count);
    k += count;
  }
}
template <class C>
INLINE void pad_row(C* rows, int64_t panel, int64_t row, int64_t k) {  // zeros from k to the block's end
  if (k % kBlock<C>) std::fill_n(panel_run(rows, panel, row, k), kBlock<C> - k % kBlock<C>, C(0.0f));
}

// to[column][row] = from[row][column] of 16 x 16 units of 4 bytes.
INLINE void transpose_units(const uint32_t* from, int64_t from_step, uint32_t* to, int64_t to_step) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_step);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * to_step, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_step, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_step, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_step, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) std::memcpy(to + j * to_step + i, from + i * from_step + j, 4);
#endif
}
INLINE void transpose_units(const double* from, int64_t from_step, double* to, int64_t to_step) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_step + i] = from[i * from_step + j];
}

template <class C>
using unit_word = std::conditional_t<std::is_same_v<C, double>, double, uint32_t>;
template <class C>
INLINE void transpose_block(const C* from, int64_t from_step, C* to, int64_t to_step) {
  using W = unit_word<C>;
  transpose_units(
      reinterpret_cast<const W*>(from), from_step / kUnit<C>, reinterpret_cast<W*>(to), to_step / kUnit<C>);
}

// A pair of bfloat16 rows to units: to[i] = (even[i], odd[i]), for 16 columns.
INLINE void interleave(const bf16* even, const bf16* odd, bf16* to) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  for (int i = 0; i < 16; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd[i];
  }
#endif
}

// Where 16 neighbouring values of a row come from; `valid(c)` of them exist.

template <class T, class C>
struct GatheredRows {  // row r is row index[r] of a matrix in the tensor's dtype
  const T* base;
  const int64_t* index;
  int64_t step, width;
  INLINE const T* at(int64_t row, int64_t column) const { return base + index[row] * step + column; }
  INLINE void fetch(int64_t row, int64_t column, int64_t columns) const {  // into the second-level cache
    const char* from = reinterpret_cast<const char*>(at(row, column));
    for (int64_t i = 0; i < columns * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(from + i, 0, 2);
  }
  INLINE void read(int64_t row, int64_t column, C* to) const {
    const int64_t valid = std::min<int64_t>(16, width - column);
    convert(at(row, column), to, valid);
    std::fill(to + valid, to + 16, C(0.0f));
  }
};
template <class C>
struct PanelRows {  // row index[r] of a left operand
  const C* base;
  const int64_t* index;
  int64_t panel;
  INLINE const C* at(int64_t row, int64_t column) const { return panel_run(base, panel, index[row], column); }
  INLINE void fetch(int64_t, int64_t, int64_t) const {}  // lies in the order in which it is read
  INLINE void read(int64_t row, int64_t column, C* to) const {
    std::memcpy(to, at(row, column), 16 * sizeof(C));
  }
};

// Rows r0..r1 as the inner dimension of a left operand: to[column c0..c0+columns][row], padded with zeros.
template <class C, class Source>
void pack_left_transposed(const Source& source, int64_t r0, int64_t r1, int64_t c0, int64_t columns, C* to) {
  const int64_t panel = panel_size<C>(r1 - r0);
  alignas(64) C block[16 * kBlock<C>];
  alignas(64) C even[16], odd[16];
  for (int64_t c = 0; c < columns; c += 16) {
    for (int64_t r = r0; r < r1; r += kBlock<C>) {
      for (int i = 0; i < kUnits; ++i) {
        C* unit_row = block + i * kBlock<C>;
        if constexpr (kUnit<C> == 1) {
          if (r + i < r1) source.read(r + i, c0 + c, unit_row); else std::fill(unit_row, unit_row + 16, C(0.0f));
        } else {
          std::fill(even, even + 16, C(0.0f));
          std::fill(odd, odd + 16, C(0.0f));
          if (r + 2 * i < r1) source.read(r + 2 * i, c0 + c, even);
          if (r + 2 * i + 1 < r1) source.read(r + 2 * i + 1, c0 + c, odd);
          interleave(even, odd, unit_row);
        }
      }
      transpose_block(block, kBlock<C>, to + c / kRows * panel + (r - r0) / kBlock<C> * 16 * kBlock<C>, kBlock<C>);
    }
  }
}

// Rows r0..r1 as the inner dimension of a right operand, columns c0..c0+kColumns; rows padded with zeros.
template <class C, class Source>
void pack_right_rows(const Source& source, int64_t r0, int64_t r1, int64_t c0, int64_t columns, C* to) {
  constexpr int n = kColumns<C>;
  alignas(64) C even[16], odd[16];
  for (int64_t r = r0; r < r0 + round_up(r1 - r0, kBlock<C>); r += kUnit<C>) {
    for (int64_t c = 0; c < n; c += 16, to += 16 * kUnit<C>) {
      if (r >= r1 || c >= columns) {
        std::fill(to, to + 16 * kUnit<C>, C(0.0f));
      } else if constexpr (kUnit<C> == 1) {
        source.read(r, c0 + c, to);
      } else {
        source.read(r, c0 + c, even);
        if (r + 1 < r1) source.read(r + 1, c0 + c, odd); else std::fill(odd, odd + 16, C(0.0f));
        interleave(even, odd, to);
      }
    }
  }
}

// A weight of one expert: value (column n of the output, k of the inner dimension) lies at base + n*n_step + k*k_step.
template <class T>
struct Weight {
  const T* base;
  int64_t n_step, k_step;
  Weight column(int64_t n) const { return {base + n * n_step, n_step, k_step}; }
};

// 16 columns c.. of one block of a weight, where the inner dimension is contiguous or nothing is.
template <class C, class T>
INLINE void pack_weight_block(const Weight<T>& w, int64_t wide, int64_t k0, int64_t depth, C* to, int64_t to_step) {
  const T* from = w.base + k0 * w.k_step;
  if (std::is_same_v<T, C> && w.k_step == 1 && wide == 16 && depth == kBlock<C> && w.n_step % kUnit<C> == 0) {
    return transpose_block(reinterpret_cast<const C*>(from), w.n_step, to, to_step);
  }
  alignas(64) C block[16 * kBlock<C>];
  std::fill(block, block + 16 * kBlock<C>, C(0.0f));
  for (int64_t i = 0; i < wide; ++i) {
    if (w.k_step == 1) {
      convert(from + i * w.n_step, block + i * kBlock<C>, depth);
    } else {
      for (int64_t j = 0; j < depth; ++j) convert(from + i * w.n_step + j * w.k_step, block + i * kBlock<C> + j, 1);
    }
  }
  transpose_block(block, kBlock<C>, to, to_step);
}

// 16 columns of one unit of a weight whose columns are contiguous.
template <class C, class T>
INLINE void pack_unit(const T* from, int64_t k_step, C* to) {
  if constexpr (kUnit<C> == 2) interleave(from, from + k_step, to);
  else convert(from, to, 16);
}
// The same where only `wide` columns and `deep` values of the inner dimension exist; the others are zero.
template <class C, class T>
void pack_part_of_unit(const T* from, int64_t k_step, int64_t wide, int64_t deep, C* to) {
  T line[kUnit<C>][16] = {};
  for (int64_t j = 0; j < std::min<int64_t>(deep, kUnit<C>); ++j) std::copy_n(from + j * k_step, wide, line[j]);
  pack_unit<C>(line[0], 16, to);
}

// A weight whose columns are contiguous: all panels at once, to read long runs of memory.
template <class C, class T>
void pack_contiguous_columns(const Weight<T>& w, int64_t columns, int64_t k, C* to) {
  constexpr int64_t n = kColumns<C>, u = kUnit<C>, ahead = 16;  // rows to fetch early
  const int64_t panel = round_up(k, kBlock<C>) * n;
  for (int64_t k0 = 0; k0 < round_up(k, kBlock<C>); k0 += u) {
    const T* from = w.base + k0 * w.k_step;
    for (int64_t c = 0; c < round_up(columns, n); c += 16) {
      const int64_t wide = std::clamp<int64_t>(columns - c, 0, 16), deep = std::max<int64_t>(k - k0, 0);
      C* out = to + c / n * panel + k0 * n + c % n * u;
      if (wide == 16 && deep >= u) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < u; ++j) __builtin_prefetch(from + c + (ahead + j) * w.k_step);
        pack_unit<C>(from + c, w.k_step, out);
      } else {
        pack_part_of_unit<C>(from + c, w.k_step, wide, deep, out);
      }
    }
  }
}

// Columns 0..columns of a weight as panels, one after the other; k padded with zeros to blocks, columns to kColumns.
template <class C, class T>
void pack_weight(const Weight<T>& w, int64_t columns, int64_t k, C* to) {
  constexpr int n = kColumns<C>, u = kUnit<C>;
  const int64_t panel = round_up(k, kBlock<C>) * n;
  if (w.n_step == 1) return pack_contiguous_columns<C>(w, columns, k, to);
  for (int64_t c = 0; c < round_up(columns, n); c += 16) {
    const int64_t wide = std::clamp<int64_t>(columns - c, 0, 16);
    for (int64_t k0 = 0; k0 < k; k0 += kBlock<C>) {
      C* out = to + c / n * panel + k0 * n + c % n * u;
      pack_weight_block<C>(w.column(c), wide, k0, std::min<int64_t>(kBlock<C>, k - k0), out, n * u);
    }
  }
}

}  // namespace hf_moe
