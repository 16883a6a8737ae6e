// Products of integers, whose sums are exact: every instruction set gives the same.
#pragma once

#include "simd.h"

namespace Q3N_LEVEL {

// Stores integers whose absolute value is below 2^15.
inline void store(int16_t* p, i32v v) {
  typedef int16_t i16h __attribute__((vector_size(2 * kLanes)));
  const i16h narrow = __builtin_convertvector(v, i16h);
  std::memcpy(p, &narrow, sizeof narrow);
}

inline i16v load(const int16_t* p) {
  i16v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// 2 kLanes bytes as 16-bit integers.
inline i16v widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (i16v)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (i16v)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__x86_64__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (i16v)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#elif defined(__aarch64__)
  return (i16v)vmovl_s8(vld1_s8(p));
#else
  typedef int8_t i8v __attribute__((vector_size(2 * kLanes)));
  i8v bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, i16v);
#endif
}

// kLanes bytes without a sign as 32-bit integers; of other vectors gcc converts each alone.
inline i32v widen(const uint8_t* p) {
#if defined(__AVX512F__)
  return (i32v)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return (i32v)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
#else
  typedef uint8_t u8v __attribute__((vector_size(kLanes)));
  u8v bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, i32v);
#endif
}

// The masked tail: n bytes, zeros beyond.
inline i16v widen(const int8_t* p, int64_t n) {
  if (n == 2 * kLanes) return widen(p);
  int8_t padded[2 * kLanes] = {};
  std::memcpy(padded, p, n);
  return widen(padded);
}

#if defined(__aarch64__)
// Sums of products of 16-bit integers: two vectors, whose sums of adjacent lanes are wanted.
struct Products {
  i32v low, high;
  Products operator+(Products other) const { return {low + other.low, high + other.high}; }
};

inline Products add_products(i16v a, i16v b, Products c) {
  const int16x8_t a8 = (int16x8_t)a, b8 = (int16x8_t)b;
  return {(i32v)vmlal_s16((int32x4_t)c.low, vget_low_s16(a8), vget_low_s16(b8)),
          (i32v)vmlal_high_s16((int32x4_t)c.high, a8, b8)};
}

inline i32v pair_sums(Products c) { return (i32v)vpaddq_s32((int32x4_t)c.low, (int32x4_t)c.high); }
#else
using Products = i32v;

inline i32v pair_sums(Products c) { return c; }

// c + the sums of a * b over pairs of adjacent lanes.
inline i32v add_products(i16v a, i16v b, i32v c) {
#if defined(__AVX512VNNI__)
  return (i32v)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
  return c + (i32v)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return c + (i32v)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return c + (i32v)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  // Two 16-bit integers in each lane; << keeps the lower, >> the upper.
  const i32v a2 = (i32v)a, b2 = (i32v)b;
  return c + (a2 << 16 >> 16) * (b2 << 16 >> 16) + (a2 >> 16) * (b2 >> 16);
#endif
}
#endif

inline int32_t sum(i32v v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#elif defined(__aarch64__)
  return vaddvq_s32((int32x4_t)v);
#else
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// One step of a dot product of int8 weights with x in 16 bits, as Terms; sums are exact. Bytes are
// multiplied: x's signed upper ones, and its unsigned lower ones.
struct IntegerTerms {
  using Weight = int8x16_t;
  struct Vector {
    int8x16_t upper;
    uint8x16_t lower;
  };
  struct Sum {
    int32x4_t upper, lower;
  };
  static constexpr int64_t kCount = 4 * kLanes;
  static Weight weight(const int8_t* p, int64_t n) {
    if (n == kCount) return vld1q_s8(p);
    int8_t padded[kCount] = {};
    std::memcpy(padded, p, n);
    return vld1q_s8(padded);
  }
  static Vector vector(const int16_t* p) {
    const int8x16x2_t bytes = vld2q_s8(reinterpret_cast<const int8_t*>(p));
    return {bytes.val[1], vreinterpretq_u8_s8(bytes.val[0])};
  }
  static Sum add(Weight w, Vector x, Sum c) {
    return {vdotq_s32(c.upper, w, x.upper), vusdotq_s32(c.lower, x.lower, w)};
  }
  static int32_t total(Sum c) { return vaddvq_s32(vaddq_s32(vshlq_n_s32(c.upper, 8), c.lower)); }
};
#else
// One step of a dot product of int8 weights with x in 16 bits, as Terms; sums are exact.
struct IntegerTerms {
  using Weight = i16v;
  using Vector = i16v;
  using Sum = Products;
  static constexpr int64_t kCount = 2 * kLanes;
  static Weight weight(const int8_t* p, int64_t n) { return widen(p, n); }
  static Vector vector(const int16_t* p) { return load(p); }
  static Sum add(Weight w, Vector x, Sum c) { return add_products(x, w, c); }
  static int32_t total(Sum c) { return sum(pair_sums(c)); }
};
#endif

}  // namespace Q3N_LEVEL
