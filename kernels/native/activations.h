// A = x, converted for products with a packed weight: int16 or fp32, or bf16 as it is.
#pragma once

#include <limits>
#include <vector>

#include "packed_weight.h"

namespace Q3N_LEVEL {

// A token of x is `terms` terms, each `width` words, whose products with the weight are added.
struct Activations {
  int64_t terms, width, block, blocks;  // width: padded with zeros
  const int32_t* first;                 // of `words`, or x itself
  int64_t stride;                       // words between terms
  std::vector<int32_t> words;
  std::vector<float> scales;  // of each block
  std::vector<int32_t> sums;  // of each block's integers, or lower bytes: see kInt8Offset

  const int32_t* term(int64_t i) const { return first + i * stride; }
  const float* scale(int64_t i) const { return scales.data() + i * blocks; }
  const int32_t* sum(int64_t i) const { return sums.data() + i * blocks; }
};

// Powers of two from 2^-126 to 2^127.
inline float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds n values (n is a multiple of kLanes) to integers of `bits` bits and a sign, scaled so that
// the largest fits, and leaves the rounding errors in x. Returns the scale, a power of two. If a
// value is not finite: NaN, and zeros in `out`.
inline float round_block(float* x, int16_t* out, int32_t* sum, int64_t n, int bits) {
  f32v largest{}, zero_if_finite{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32v v = load(x + i), size = v < 0.0f ? -v : v;
    largest = size > largest ? size : largest;
    zero_if_finite += v - v;
  }
  float most = 0.0f;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, largest[i]);
  *sum = 0;
  if (!(Q3N_LEVEL::sum(zero_if_finite) == 0.0f)) {
    std::memset(out, 0, n * sizeof *out);
    return std::numeric_limits<float>::quiet_NaN();
  }
  uint32_t field;
  std::memcpy(&field, &most, sizeof field);
  // From 2^-80 on, so that products of this, a sum and a scale of the weight from 2^-32 on are no
  // denormals: then FMA and two instructions round alike.
  const int exponent = std::max(static_cast<int>(field >> 23) - 127, -80);
  const float unit = power_of_two(exponent + 1 - bits), inverse = power_of_two(bits - 1 - exponent);
  i32v total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32v v = load(x + i), rounded = nearest_integer(v * inverse);
    const i32v integers = __builtin_convertvector(rounded, i32v);
    store(out + i, integers);
    store(x + i, v - rounded * unit);
    total += integers;
  }
  for (int i = 0; i < kLanes; ++i) *sum += total[i];
  return unit;
}

// Reorders n integers (n is a multiple of kLanes) for Bytes, eight at a time.
inline void split([[maybe_unused]] int16_t* x, [[maybe_unused]] int64_t n,
                  [[maybe_unused]] Encoding encoding) {
#if defined(__AVX512VNNI__)  // upper bytes, then lower bytes
  if (!in_nibbles(encoding)) return;
  const __m256i places = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14));
  for (int64_t i = 0; i < n; i += kLanes) {
    auto* integers = reinterpret_cast<__m256i*>(x + i);
    _mm256_storeu_si256(integers, _mm256_shuffle_epi8(_mm256_loadu_si256(integers), places));
  }
#elif defined(__ARM_FEATURE_DOTPROD)  // four upper bytes, their lower bytes, and again
  constexpr uint8_t kInt4Places[] = {1, 9, 3, 11, 0, 8, 2, 10, 5, 13, 7, 15, 4, 12, 6, 14};
  constexpr uint8_t kInt8Places[] = {1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14};
  const uint8x16_t places = vld1q_u8(in_nibbles(encoding) ? kInt4Places : kInt8Places);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(x + i);
    vst1q_u8(bytes, vqtbl1q_u8(vld1q_u8(bytes), places));
  }
#endif
}

// For integers. 15 bits hold a bf16 exactly if it is at least 1/128 of its block's largest;
// an fp32 becomes two terms of 14 bits, because rounding may carry.
template <class T>
void write_integers(Activations& a, const T* x, int64_t K, int64_t m, Encoding encoding) {
  constexpr int kTerms = sizeof(T) == 4 ? 2 : 1, kBits = sizeof(T) == 4 ? 14 : 15;
  const float unit = is_fp4(encoding) ? 0.5f : 1.0f;  // weights are doubled
  alignas(64) float rest[kLargestBlock];
  for (int64_t b = 0; b < a.blocks; ++b) {
    for (int64_t i = 0; i < a.block; i += kLanes) {
      store(rest + i,
            load(x + b * a.block + i, std::clamp<int64_t>(K - b * a.block - i, 0, kLanes)));
    }
    for (int64_t i = 0; i < kTerms; ++i) {
      const int64_t term = m * kTerms + i;
      int16_t* out = reinterpret_cast<int16_t*>(a.words.data() + term * a.width) + b * a.block;
      a.scales[term * a.blocks + b] =
          round_block(rest, out, &a.sums[term * a.blocks + b], a.block, kBits) * unit;
      if (kInt8Offset && encoding == kInt8) {
        int32_t& sum = a.sums[term * a.blocks + b] = 0;
        for (int64_t c = 0; c < a.block; ++c) sum += out[c] & 255;
      }
      split(out, a.block, encoding);
    }
  }
}

template <class T>
void write_floats(Activations& a, const T* x, int64_t K, int64_t m, float scale) {
  float* out = reinterpret_cast<float*>(a.words.data() + m * a.width);
  for_vectors(K,
              [&](int64_t i, int64_t lanes) { store(out + i, load(x + i, lanes) * scale, lanes); });
}

// Converts x [M, K], tokens `stride` apart, for products with w.
template <class T>
Activations activations(const T* x, int64_t M, int64_t stride, const PackedWeight& w) {
  const bool integers = is_integer(w.encoding), pairs = w.in_pairs<T>();
  const float scale = w.encoding == kFp8 && !pairs ? kFp8Scale : 1.0f;
  const int64_t terms = integers && sizeof(T) == 4 ? 2 : 1, columns = w.blocks * w.block;
  const int64_t width = integers || pairs ? columns / 2 : columns;
  Activations a{terms, width, w.block, w.blocks, nullptr, width, {}, {}, {}};
  a.scales.resize(M * terms * a.blocks, scale);
  a.sums.resize(M * terms * a.blocks);
  if (pairs && w.K == columns && stride % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
    a.first = reinterpret_cast<const int32_t*>(x), a.stride = stride / 2;
    return a;
  }
  a.words.resize(M * terms * width);
  a.first = a.words.data();
  parallel(M, grain_of(w.K), [&](int64_t m) {
    if (integers) {
      write_integers(a, x + m * stride, w.K, m, w.encoding);
    } else if (pairs) {
      std::memcpy(a.words.data() + m * a.width, x + m * stride, w.K * sizeof(T));
    } else {
      write_floats(a, x + m * stride, w.K, m, scale);
    }
  });
  return a;
}

}  // namespace Q3N_LEVEL
