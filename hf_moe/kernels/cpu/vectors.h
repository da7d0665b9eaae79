// Vectors of the machine's own width (GCC vector extensions), conversions, and loads that bear any alignment.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NATIVE_BF16 1
#else
#define NATIVE_BF16 0
#endif

#define INLINE inline __attribute__((always_inline))

namespace hf_moe {

using bf16 = c10::BFloat16;
using half = c10::Half;

// What a dtype is multiplied in: bfloat16 as it is where the machine has products of pairs, else float32.
template <class T>
struct compute { using type = float; };
template <>
struct compute<double> { using type = double; };
#if NATIVE_BF16
template <>
struct compute<bf16> { using type = bf16; };
#endif

template <class C>
struct accumulator { using type = float; };
template <>
struct accumulator<double> { using type = double; };

// A unit is what one vector lane multiplies: one value, or a pair of bfloat16.
template <class C>
constexpr int kUnit = std::is_same_v<C, bf16> ? 2 : 1;
constexpr int kUnits = 16;  // units in a block of a row, and rows in a panel
template <class C>
constexpr int kBlock = kUnits * kUnit<C>;
constexpr int kRows = 16;

template <class A>
struct vector_of {
  typedef A type __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int lanes = VECTOR_BYTES / sizeof(A);
};
template <class A>
using Vec = typename vector_of<A>::type;
template <class A>
constexpr int kLanes = vector_of<A>::lanes;

// Columns of a packed weight panel, a multiple of 16.
template <class C>
constexpr int kColumns = std::is_same_v<C, bf16> ? 32 : 16;

template <class A>
INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class A>
INLINE void store(A* p, const Vec<A>& v) {
  std::memcpy(p, &v, sizeof(v));
}

INLINE float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(half x) { return static_cast<float>(x); }

// A vector of values of another dtype. Written in whole vectors, because compilers build one lane by lane otherwise.
template <class A, class T>
INLINE Vec<A> load_wide(const T* p) {
  if constexpr (std::is_same_v<A, T>) {
    return load(p);
  } else if constexpr (std::is_same_v<T, bf16>) {
    typedef uint16_t Short __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));
    Short v;
    std::memcpy(&v, p, sizeof(v));
    return (Vec<A>)(__builtin_convertvector(v, Word) << 16);
  } else {
#if defined(__AVX512F__)
    return (Vec<A>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = widen(p[i]);
    return v;
#endif
  }
}

template <class T>
INLINE T narrow(float x) {
  return static_cast<T>(x);
}
template <>
INLINE bf16 narrow<bf16>(float x) {  // round to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16(static_cast<uint16_t>(x != x ? 0x7fc0u : rounded), bf16::from_bits());
}
template <class T>
INLINE T narrow(double x) {
  return static_cast<T>(x);
}

// Copies `n` values of a row and changes their dtype.
template <class From, class To>
INLINE void convert(const From* from, To* to, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, n * sizeof(To));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<To>(widen(from[i]));
  }
}

// The same for results that nobody reads soon: lines that are written whole need not be read first.
template <class From, class To>
INLINE void convert_past_caches(const From* from, To* to, int64_t n) {
#if defined(__AVX512F__)
  constexpr int64_t line = 64 / sizeof(To);
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && n % line == 0) {
    alignas(64) To values[line];
    for (int64_t i = 0; i < n; i += line) {
      convert(from + i, values, line);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(values));
    }
    return;
  }
#endif
  convert(from, to, n);
}
// Makes the above visible to other threads.
INLINE void finish_past_caches() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace hf_moe
