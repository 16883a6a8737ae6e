// The formats of packed weights: how a line of 64 bytes, a few columns of a panel of 16 output
// channels, is unpacked and multiplied.
#pragma once

#include "integers.h"

namespace Q3N_LEVEL {

constexpr int kPanelWidth = 16;               // output channels of a panel
constexpr int kParts = kPanelWidth / kLanes;  // vectors that hold one number of each channel
constexpr int64_t kLine = 64;                 // bytes
typedef uint8_t b8v __attribute__((vector_size(4 * kLanes)));

inline u16v load_words(const uint8_t* p) {
  u16v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Lines of a format are kUnpacked: from `unpack_lines`; or kReady: they need no unpacking.

// Sums in int32, exact in any order; a word of x is two columns of 16 bits.
struct Integers {
  using Family = Integers;
  static constexpr bool kUnpacked = false, kReady = false;
  static constexpr bool kExact = true;
  static constexpr int64_t kLineBytes = kLine;
  using Value = i16v;
  using Sum = Products;
  static constexpr int64_t kColumns = 2;   // of a word of x
  static constexpr int kWords = 1;         // of x that one vector of weights takes
  static constexpr int kAccumulators = 1;  // of an output in a large register tile
  static Value spread(const int32_t* x, int64_t s) { return (i16v)(x[s] + i32v{}); }
  static Sum add(Value w, Value x, Sum c) { return add_products(w, x, c); }
  using Total = i32v;
  static Total total(Sum s) { return pair_sums(s); }
};

// Sums in fp32; a word of x is one column.
struct Floats {
  using Family = Floats;
  static constexpr bool kUnpacked = false, kReady = false;
  static constexpr bool kExact = false;
  static constexpr int64_t kLineBytes = kLine;
  using Value = f32v;
  using Sum = f32v;
  static constexpr int64_t kColumns = 1;
  static constexpr int kWords = 1;
  static constexpr int kAccumulators = 2;
  static Value spread(const int32_t* x, int64_t s) { return (f32v)(x[s] + i32v{}); }
  static Sum add(Value w, Value x, Sum c) { return fma(w, x, c); }
  using Total = f32v;
  static Total total(Sum s) { return s; }
};

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
// Sums in int32 of products of bytes, four columns of a channel in each lane: weights with x's
// upper bytes, and with its lower bytes, in the order of `split`. Weights are of 7 bits without a
// sign, or of 8 with one where the instruction set has i8mm.
struct Bytes {
  using Family = Bytes;
  static constexpr bool kUnpacked = false, kReady = false;
  static constexpr bool kExact = true;
  static constexpr int64_t kLineBytes = kLine;
  using Value = i32v;
  struct Pair {
    i32v upper, lower;
    Pair operator+(Pair other) const { return {upper + other.upper, lower + other.lower}; }
  };
  using Sum = Pair;
  static constexpr int64_t kColumns = 2;
  static constexpr int kWords = 2;
  static constexpr int kAccumulators = 2;
  using Total = i32v;
  static Total total(Sum s) { return (s.upper << 8) + s.lower; }
#if defined(__AVX512VNNI__)
  static Pair spread(const int32_t* x, int64_t s) { return {x[s] + i32v{}, x[2 + s] + i32v{}}; }
  static Sum add(Value w, Pair x, Sum c) {
    return {(i32v)_mm512_dpbusd_epi32((__m512i)c.upper, (__m512i)w, (__m512i)x.upper),
            (i32v)_mm512_dpbusd_epi32((__m512i)c.lower, (__m512i)x.lower, (__m512i)w)};
  }
#else
  static int8x8_t spread(const int32_t* x, int64_t s) {
    return vld1_s8(reinterpret_cast<const int8_t*>(x + 2 * s));
  }
  static Sum add(Value w, int8x8_t x, Sum c) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return {add_upper(w, x, c.upper),
            (i32v)vsudotq_lane_s32((int32x4_t)c.lower, (int8x16_t)w, vreinterpret_u8_s8(x), 1)};
#else
    return {add_upper(w, x, c.upper), add_lower(w, x, c.lower)};
#endif
  }
  static i32v add_upper(Value w, int8x8_t x, i32v c) {
    return (i32v)vdotq_lane_s32((int32x4_t)c, (int8x16_t)w, x, 0);
  }
  static i32v add_lower(Value w, int8x8_t x, i32v c) {  // without signs
    return (i32v)vdotq_lane_u32((uint32x4_t)c, (uint8x16_t)w, vreinterpret_u8_s8(x), 1);
  }
#endif
};
#endif

// A line unpacks to kLineVectors vectors per part of the channels, each for kWords words of x.
#if defined(__ARM_FEATURE_DOTPROD)
#if defined(__ARM_FEATURE_MATMUL_INT8)
using SignedBytes = Bytes;
#else
// Weights have 8 bits and a sign. Those of products with lower bytes are 128 larger, so that they
// have none.
struct SignedBytes : Bytes {
  using Family = SignedBytes;
  static Sum add(Value w, int8x8_t x, Sum c) {
    const Value larger = (Value)veorq_u8((uint8x16_t)w, vdupq_n_u8(128));
    return {add_upper(w, x, c.upper), add_lower(larger, x, c.lower)};
  }
};
#endif

struct Int8 : SignedBytes {
  static constexpr int kLineVectors = 2;
  static constexpr int64_t kLineBytes = kLineVectors * kLine;
  static void unpack(const uint8_t* lines, int64_t part, Value (&out)[kLineVectors]) {
    for (int s = 0; s < kLineVectors; ++s) {
      const auto pairs = [&](int64_t i) {  // columns 2 i and 2 i + 1 of 8 channels
        return vreinterpretq_s16_u8(vld1q_u8(lines + s * kLine + 32 * i + 16 * (part / 2)));
      };
      const int16x8_t first = pairs(0), second = pairs(1);
      out[s] = (i32v)(part % 2 ? vzip2q_s16(first, second) : vzip1q_s16(first, second));
    }
  }
};
#else
struct Int8 : Integers {
  static constexpr int kLineVectors = 2;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    for (int s = 0; s < kLineVectors; ++s) {
      out[s] = widen(reinterpret_cast<const int8_t*>(line) + 32 * s + 2 * kLanes * part);
    }
  }
};
#endif

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
struct Int4 : Bytes {
  static constexpr int kLineVectors = 2;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    const b8v bytes = (b8v)load_words(line + 4 * kLanes * part);
    out[0] = (i32v)bytes & 0x0f0f0f0f;
    out[1] = (i32v)(bytes >> 4);
  }
};
#else
struct Int4 : Integers {
  static constexpr int kLineVectors = 4;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    const u16v words = load_words(line + 4 * kLanes * part);
    out[0] = (i16v)(words & 15);
    out[1] = (i16v)(words >> 4 & 15);
    out[2] = (i16v)(words >> 8 & 15);
    out[3] = (i16v)(words >> 12);
  }
};
#endif

// Codes 0 to 15 of e2m1, one in a byte, as twice their value plus kFp4Offset: 0 to 24.
constexpr int32_t kFp4Offset = 12;
inline b8v doubled_e2m1(b8v codes) {
#if defined(__AVX512BW__) || defined(__AVX2__) || defined(__aarch64__)
  constexpr uint8_t kValues[] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
#endif
#if defined(__AVX512BW__)
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kValues));
  return (b8v)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)codes);
#elif defined(__AVX2__)
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kValues));
  return (b8v)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)codes);
#elif defined(__aarch64__)
  return (b8v)vqtbl1q_u8(vld1q_u8(kValues), (uint8x16_t)codes);
#else
  const b8v size = codes & 7, beyond = (b8v)(size > 4) & (size - 4);
  const b8v doubled = size + beyond + ((b8v)(size == 7) & 2), negative = (b8v)(codes > 7);
  return ((doubled ^ negative) - negative) + kFp4Offset;
#endif
}

struct Fp4 : Int4 {
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    Int4::unpack(line, part, out);
    for (Value& codes : out) {
      codes = (Value)doubled_e2m1((b8v)codes);
      if constexpr (std::is_same_v<Family, Integers>) codes &= 255;
    }
  }
};

// e4m3 as fp32 without a new exponent bias: 2^-120 of the value. So denormals must not be flushed.
struct Fp8 : Floats {
  static constexpr int kLineVectors = 4;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    const u16v words = load_words(line + 4 * kLanes * part);
    const auto bf16s = [](u16v w) { return (u32v)((w & 0x8000) | (w >> 4 & 0x07f0)); };
    const u32v low = bf16s(words << 8), high = bf16s(words);
    out[0] = (f32v)(low << 16), out[1] = (f32v)(low & 0xffff0000);
    out[2] = (f32v)(high << 16), out[3] = (f32v)(high & 0xffff0000);
  }
};

// Weights in bf16: even columns are the lower halves of words, odd ones the upper.
struct Bf16 : Floats {
  static constexpr int kLineVectors = 2;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    const u32v words = (u32v)load_words(line + 4 * kLanes * part);
    out[0] = (f32v)(words << 16), out[1] = (f32v)(words & 0xffff0000);
  }
};

// Whether x of type T is multiplied as it is with weights in bf16, and with those in FP8.
template <class T>
constexpr bool kInPairs = false;
template <class T>
constexpr bool kFp8InPairs = false;
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
inline constexpr bool kInPairs<bf16> = true;

// Products of bf16 with bf16, which are added in pairs: a word of x is two columns.
struct Pairs {
  using Family = Pairs;
  static constexpr bool kUnpacked = false, kReady = false;
  static constexpr bool kExact = false;
  static constexpr int64_t kLineBytes = kLine;
  using Value = i32v;
  using Sum = f32v;
  static constexpr int64_t kColumns = 2;
  static constexpr int kWords = 1;
  static constexpr int kAccumulators = kLanes == 16 ? 1 : 2;
  using Total = f32v;
  static Value spread(const int32_t* x, int64_t s) { return x[s] + i32v{}; }
  static Sum add(Value w, Value x, Sum c) {
    using Bf16s = Terms<bf16>::type;
    return Terms<bf16>::add((Bf16s)w, (Bf16s)x, c);
  }
  static Total total(Sum s) { return s; }
};

// Weights in bf16. Takes two lines.
struct Bf16Pairs : Pairs {
  static constexpr bool kReady = true;
  static constexpr int64_t kLineBytes = 2 * kLine;
  static constexpr int kLineVectors = 2;
  static void unpack(const uint8_t* lines, int64_t part, Value (&out)[kLineVectors]) {
    std::memcpy(out, lines + 4 * kLanes * part, sizeof *out);
    std::memcpy(out + 1, lines + kLine + 4 * kLanes * part, sizeof *out);
  }
};
#endif

#if defined(__AVX512BF16__)
template <>
inline constexpr bool kFp8InPairs<bf16> = true;

// Weights in e4m3, unpacked to bf16. Their denormals, zero too, are rare.
struct Fp8Pairs : Pairs {
  static constexpr int kLineVectors = 2;
  static void unpack(const uint8_t* line, int64_t, Value (&out)[kLineVectors]) {
    const __m512i words = _mm512_loadu_si512(line), lower = _mm512_slli_epi16(words, 8);
    out[0] = normal(_mm512_slli_epi16(words, 4), lower);
    out[1] = normal(_mm512_srli_epi16(words, 4), words);
    if (_mm512_testn_epi8_mask(words, _mm512_set1_epi8(0x78))) [[unlikely]] {
      out[0] = with_denormals(out[0], lower), out[1] = with_denormals(out[1], words);
    }
  }

 private:
  // Exponent and mantissa of e4m3 where bf16 has its own; the sign from the uppermost bit.
  static Value normal(__m512i shifted, __m512i sign) {
    const __m512i size = _mm512_and_si512(shifted, _mm512_set1_epi16(0x07f0));
    const __m512i biased = _mm512_add_epi16(size, _mm512_set1_epi16((127 - 7) << 7));
    return (Value)_mm512_or_si512(biased, _mm512_and_si512(sign, _mm512_set1_epi16(INT16_MIN)));
  }
  // As normal numbers, multiples of 2^-9: products would flush denormals of bf16. The upper byte of
  // each word of `codes` is e4m3.
  static Value with_denormals(Value bf16s, __m512i codes) {
    const __m512i sizes = _mm512_broadcast_i32x4(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi16(INT16_MIN));
    const __m512i mantissas = _mm512_srli_epi16(codes, 8);
    const __m512i found = _mm512_or_si512(_mm512_permutexvar_epi16(mantissas, sizes), sign);
    const __mmask32 denormal = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x7800));
    return (Value)_mm512_mask_mov_epi16((__m512i)bf16s, denormal, found);
  }
};
#endif

// Lines that are already unpacked.
template <class F>
struct Unpacked : F {
  static constexpr bool kUnpacked = true;
  static constexpr int kLineVectors = 2;
  static constexpr int64_t kLineBytes = kLineVectors * kLine;
  using Value = typename F::Value;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    for (int s = 0; s < kLineVectors; ++s) {
      std::memcpy(out + s, line + s * kLine + 4 * kLanes * part, sizeof *out);
    }
  }
};

template <class F>
constexpr int64_t kLineWords = F::kLineVectors * F::kWords;
template <class F>
constexpr int64_t kLineColumns = kLineWords<F> * F::kColumns;

// Fp8's values are too small by 2^-120, so x is multiplied by 2^60, and sums by 2^60.
constexpr float kFp8Scale = 0x1p60f;

enum Encoding : int64_t { kInt8, kInt4, kFp8, kBf16, kNvfp4, kMxfp4 };

constexpr bool is_fp4(Encoding encoding) { return encoding == kNvfp4 || encoding == kMxfp4; }
constexpr bool in_nibbles(Encoding encoding) { return encoding == kInt4 || is_fp4(encoding); }
// Whether x is converted to integers, and sums are exact.
constexpr bool is_integer(Encoding encoding) { return encoding == kInt8 || in_nibbles(encoding); }

#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t kInt8Offset = 128;  // of SignedBytes
#else
constexpr int32_t kInt8Offset = 0;
#endif

}  // namespace Q3N_LEVEL
