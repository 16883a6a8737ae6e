// Vectors of floats at the instruction set that this file is compiled for. Intrinsics are here, in
// integers.h and in microkernels only. Everything is in namespace Q3N_LEVEL, one for each
// instruction set, so that the linker never merges inline functions of two of them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace Q3N_LEVEL {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;  // vectors, for the sizes of register tiles
#else
constexpr int kRegisters = 16;
#endif

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16h __attribute__((vector_size(2 * kLanes)));  // half a register
typedef uint16_t u16v __attribute__((vector_size(4 * kLanes)));  // twice as many lanes
typedef int16_t i16v __attribute__((vector_size(4 * kLanes)));

// Treats denormals as zero on this thread, as inputs and as results, or as numbers, until it is
// destroyed.
template <bool kFlush>
class Denormals {
 public:
#if defined(__x86_64__)
  Denormals() : before_(_mm_getcsr()) {
    constexpr unsigned kBits = 0x8040;  // FTZ and DAZ
    _mm_setcsr(kFlush ? before_ | kBits : before_ & ~kBits);
  }
  ~Denormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Denormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    constexpr uint64_t kBit = uint64_t{1} << 24;
    asm volatile("msr fpcr, %0" ::"r"(kFlush ? before_ | kBit : before_ & ~kBit));
  }
  ~Denormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#else
  Denormals() {}
#endif
};
using FlushDenormals = Denormals<true>;
using KeepDenormals = Denormals<false>;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline f32v splat(float x) { return x - f32v{}; }

// a * b + c, rounded once if the instruction set has FMA. All other expressions are compiled as
// written (-ffp-contract=off), so that equal inputs give equal bits wherever a formula is inlined.
inline f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Sum over the lanes, in one fixed order.
inline float sum(f32v v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// The lanes in which a comparison holds, as bits.
inline uint32_t lane_mask(i32v holds) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)holds);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)holds);
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (holds[i] & 1u) << i;
  return mask;
#endif
}

inline f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline f32v load(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#elif defined(__aarch64__)
  return (f32v)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16);
#else
  u16h bits;
  std::memcpy(&bits, p, sizeof bits);
  return (f32v)(__builtin_convertvector(bits, u32v) << 16);
#endif
}

inline f32v load(const fp16* p) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (f32v)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#else
  f32v v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

inline void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }

// The bits of v rounded to bf16 (nearest even), in the upper half of each lane.
inline u32v round_to_bf16(f32v v) {
  const u32v bits = (u32v)v;
  const u32v rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? rounded : bits | 0x400000;
}

inline void store(bf16* p, f32v v) {
#if defined(__AVX512BF16__)
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
  const __m256i bits = _mm512_cvtepi32_epi16((__m512i)(round_to_bf16(v) >> 16));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  const bfloat16x4_t bits = vcvt_bf16_f32((float32x4_t)v);
#else
  const u16h bits = __builtin_convertvector(round_to_bf16(v) >> 16, u16h);
#endif
  std::memcpy(p, &bits, sizeof bits);
}

inline void store(fp16* p, f32v v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#elif defined(__aarch64__)
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = fp16(v[i]);
#endif
}

// The masked tail: the first n lanes from p, `beyond` in the others.
template <class T>
inline f32v load(const T* p, int64_t n, T beyond = T{}) {
  if (n == kLanes) return load(p);
  T padded[kLanes];
  for (int i = 0; i < kLanes; ++i) padded[i] = beyond;
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store(T* p, f32v v, int64_t n) {
  if (n == kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// Calls f(offset, lanes) over [0, n): full vectors, then one masked tail.
template <class F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, static_cast<int64_t>(kLanes));
  if (i < n) f(i, n - i);
}

// Calls f(0), ..., f(n - 1). Unrolled if N = n, so that arrays of vectors that f indexes stay in
// registers; a loop if N = 0.
template <int N, class F>
inline __attribute__((always_inline)) void repeat(int64_t n, F&& f) {
  if constexpr (N == 0) {
    for (int64_t i = 0; i < n; ++i) f(i);
  } else {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      (f(static_cast<int64_t>(I)), ...);
    }(std::make_integer_sequence<int, N>{});
  }
}

#define Q3N_INLINE __attribute__((always_inline))  // goes after a lambda's parameters

template <int kOffset, int kStep, int... I>
inline f32v every(f32v a, f32v b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kOffset + kStep * I)...);
}

// Splits four vectors of interleaved quadruples: taps[j][i] = element 4 i + j.
inline void deinterleave(const f32v (&x)[4], f32v (&taps)[4]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  const f32v even0 = every<0, 2>(x[0], x[1], lanes), odd0 = every<1, 2>(x[0], x[1], lanes);
  const f32v even1 = every<0, 2>(x[2], x[3], lanes), odd1 = every<1, 2>(x[2], x[3], lanes);
  taps[0] = every<0, 2>(even0, even1, lanes), taps[2] = every<1, 2>(even0, even1, lanes);
  taps[1] = every<0, 2>(odd0, odd1, lanes), taps[3] = every<1, 2>(odd0, odd1, lanes);
}

// v rounded to integers, ties to even, for |v| below 2^22.
inline f32v nearest_integer(f32v v) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction
  return (v + kRound) - kRound;
}

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by Cephes' polynomial: 2 ulp on [-87, 88], zero below,
// clamped above.
inline f32v exp(f32v x) {
  const auto underflows = x < -87.0f;
  x = x > 88.0f ? splat(88.0f) : x;
  const f32v n = nearest_integer(x * 1.44269504f);
  const f32v r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  f32v p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  p = (f32v)((i32v)p + (__builtin_convertvector(n, i32v) << 23));
  return underflows ? f32v{} : p;
}

// 1 / x for x in [1, 2^127]: 2 ulp.
inline f32v reciprocal(f32v x) {
#if defined(__AVX512F__)
  const f32v guess = (f32v)_mm512_rcp14_ps((__m512)x);
  return fma(guess, fma(-x, guess, splat(1.0f)), guess);  // one Newton step
#else
  return 1.0f / x;
#endif
}

inline f32v sigmoid(f32v x) { return reciprocal(1.0f + exp(-x)); }

inline f32v silu(f32v x) { return x * sigmoid(x); }

// log(1 + exp(x)) = max(x, 0) + log1p(y), y = exp(-|x|), log1p(y) = 2 atanh(y / (2 + y)).
inline f32v softplus(f32v x) {
  const f32v y = exp(x < 0.0f ? x : -x);
  const f32v s = y / (2.0f + y), s2 = s * s;
  f32v p = splat(1.0f / 15);
  for (float odd : {13.0f, 11.0f, 9.0f, 7.0f, 5.0f, 3.0f, 1.0f}) p = fma(p, s2, splat(1.0f / odd));
  return (x > 0.0f ? x : f32v{}) + 2.0f * s * p;
}

// Sum of squares of x[0..n).
template <class T>
inline float sum_of_squares(const T* x, int64_t n) {
  f32v total{};
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const f32v v = load(x + i, lanes);
    total = fma(v, v, total);
  });
  return sum(total);
}

// x . y in fp32, in one order.
template <class T, class U>
inline float dot(const T* x, const U* y, int64_t n) {
  f32v total{};
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    total = fma(load(x + i, lanes), load(y + i, lanes), total);
  });
  return sum(total);
}

// products[j] = x_j . y of N vectors, each `stride` behind the last, summed as by `dot`. They share
// y, and no sum waits for another.
template <int N, class T, class U>
inline void dots(const T* x, int64_t stride, const U* y, int64_t n, float* products) {
  f32v totals[N] = {};
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const f32v ys = load(y + i, lanes);
    repeat<N>(N, [&](int64_t j) Q3N_INLINE {
      totals[j] = fma(load(x + j * stride + i, lanes), ys, totals[j]);
    });
  });
  for (int j = 0; j < N; ++j) products[j] = sum(totals[j]);
}

template <int N>
inline void add_neighbours(f32v* v) {
  if constexpr (N > 1) {
    constexpr std::make_integer_sequence<int, kLanes> lanes{};
    repeat<N / 2>(N / 2, [&](int64_t i) __attribute__((always_inline)) {
      v[i] =
          every<0, 2>(v[2 * i], v[2 * i + 1], lanes) + every<1, 2>(v[2 * i], v[2 * i + 1], lanes);
    });
    add_neighbours<N / 2>(v);
  }
}

// Lane i: the sum over the lanes of v[i], in one fixed order, for kLanes vectors.
inline f32v lane_sums(const f32v* v) {
  f32v sums[kLanes];
  repeat<kLanes>(kLanes, [&](int64_t i) __attribute__((always_inline)) { sums[i] = v[i]; });
  add_neighbours<kLanes>(sums);
  return sums[0];
}

// One step of a dot product: the operands it loads from each side, and how it adds their products.
template <class T>
struct Terms {
  using type = f32v;
  static constexpr int64_t kCount = kLanes;
  static f32v load(const T* p) { return Q3N_LEVEL::load(p); }
  static f32v load(const T* p, int64_t n) { return Q3N_LEVEL::load(p, n); }
  static f32v add(f32v a, f32v b, f32v c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
template <>
struct Terms<bf16> {  // adds products in pairs
  using type = __m512bh;
  static constexpr int64_t kCount = 2 * kLanes;
  static __m512bh load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh load(const bf16* p, int64_t n) {
    const __mmask32 mask = (uint64_t{1} << n) - 1;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
  }
  static f32v add(__m512bh a, __m512bh b, f32v c) {
    return (f32v)_mm512_dpbf16_ps((__m512)c, a, b);
  }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Terms<bf16> {  // adds products in pairs
  using type = bfloat16x8_t;
  static constexpr int64_t kCount = 2 * kLanes;
  static type load(const bf16* p) { return vld1q_bf16(reinterpret_cast<const bfloat16_t*>(p)); }
  static type load(const bf16* p, int64_t n) {
    bf16 padded[kCount] = {};
    std::memcpy(padded, p, n * sizeof *p);
    return load(padded);
  }
  static f32v add(type a, type b, f32v c) { return (f32v)vbfdotq_f32((float32x4_t)c, a, b); }
};
#endif

// Prefetches n bytes into the second-level cache.
inline void prefetch(const void* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

}  // namespace Q3N_LEVEL
