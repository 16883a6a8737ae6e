// Packed weights, as kernels/linear/pack.py writes them: panels of 16 output channels, stored in
// lines of 64 bytes, each a few columns of K.
#pragma once

#include <numeric>
#include <optional>

#include "tensor.h"

namespace Q3N_LEVEL {

constexpr int kPanelWidth = 16;               // output channels of a panel
constexpr int kParts = kPanelWidth / kLanes;  // vectors that hold one number of each channel
constexpr int64_t kLine = 64;                 // bytes
typedef uint16_t w16v __attribute__((vector_size(4 * kLanes)));

inline w16v load_words(const uint8_t* p) {
  w16v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Sums in int32, exact in any order; a word of x is two columns of 16 bits.
struct Integers {
  using Family = Integers;
  static constexpr bool kUnpacked = false;
  static constexpr bool kExact = true;
  static constexpr int64_t kLineBytes = kLine;
  using Value = i16v;
  using Sum = i32v;
  static constexpr int64_t kColumns = 2;  // of a word of x
  static constexpr int kWords = 1;        // of x that one vector of weights takes
  static Value spread(const int32_t* x, int64_t s) { return (i16v)(x[s] + i32v{}); }
  static Sum add(Value w, Value x, Sum c) { return add_products(w, x, c); }
  using Total = i32v;
  static Total total(Sum s) { return s; }
};

// Sums in fp32; a word of x is one column.
struct Floats {
  using Family = Floats;
  static constexpr bool kUnpacked = false;
  static constexpr bool kExact = false;
  static constexpr int64_t kLineBytes = kLine;
  using Value = f32v;
  using Sum = f32v;
  static constexpr int64_t kColumns = 1;
  static constexpr int kWords = 1;
  static Value spread(const int32_t* x, int64_t s) { return (f32v)(x[s] + i32v{}); }
  static Sum add(Value w, Value x, Sum c) { return fma(w, x, c); }
  using Total = f32v;
  static Total total(Sum s) { return s; }
};

#if defined(__AVX512VNNI__)
// Sums in int32 of products of bytes, four columns of a channel in each lane: unsigned 7-bit
// weights with x's upper bytes, and with its lower bytes, ordered by `split`.
struct Bytes {
  using Family = Bytes;
  static constexpr bool kUnpacked = false;
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
  using Total = i32v;
  static Pair spread(const int32_t* x, int64_t s) { return {x[s] + i32v{}, x[2 + s] + i32v{}}; }
  static Sum add(Value w, Pair x, Sum c) {
    return {(i32v)_mm512_dpbusd_epi32((__m512i)c.upper, (__m512i)w, (__m512i)x.upper),
            (i32v)_mm512_dpbusd_epi32((__m512i)c.lower, (__m512i)x.lower, (__m512i)w)};
  }
  static Total total(Sum s) { return (s.upper << 8) + s.lower; }
};
#endif

// A line unpacks to kLineVectors vectors per part of the channels, each for kWords words of x.
struct Int8 : Integers {
  static constexpr int kLineVectors = 2;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    for (int s = 0; s < kLineVectors; ++s) {
      out[s] = widen(reinterpret_cast<const int8_t*>(line) + 32 * s + 2 * kLanes * part);
    }
  }
};

#if defined(__AVX512VNNI__)
struct Int4 : Bytes {
  static constexpr int kLineVectors = 2;
  static void unpack(const uint8_t* line, int64_t, Value (&out)[kLineVectors]) {
    const w16v words = load_words(line);
    out[0] = (i32v)words & 0x0f0f0f0f;
    out[1] = (i32v)(words >> 4) & 0x0f0f0f0f;
  }
};
#else
struct Int4 : Integers {
  static constexpr int kLineVectors = 4;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    const w16v words = load_words(line + 4 * kLanes * part);
    out[0] = (i16v)(words & 15);
    out[1] = (i16v)(words >> 4 & 15);
    out[2] = (i16v)(words >> 8 & 15);
    out[3] = (i16v)(words >> 12);
  }
};
#endif

// e4m3 as fp32 without a new exponent bias: 2^-120 of the value. So denormals must not be flushed.
struct Fp8 : Floats {
  static constexpr int kLineVectors = 4;
  static void unpack(const uint8_t* line, int64_t part, Value (&out)[kLineVectors]) {
    const w16v words = load_words(line + 4 * kLanes * part);
    const auto bf16s = [](w16v w) { return (u32v)((w & 0x8000) | (w >> 4 & 0x07f0)); };
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

enum Encoding : int64_t { kInt8, kInt4, kFp8, kBf16 };

constexpr bool is_integer(Encoding encoding) { return encoding == kInt8 || encoding == kInt4; }

constexpr int64_t kLargestBlock = 512;  // int8 by int16: a longer sum could overflow int32

// Columns that are summed before they are scaled: a group. If a channel has one scale: 128, or, for
// int8, the largest divisor of the padded K whose integer sum is exact.
inline int64_t block_of(Encoding encoding, int64_t K, int64_t group) {
  if (group) return group;
  return encoding == kInt8 ? std::gcd(round_up(K, 128), kLargestBlock) : 128;
}

// W [N, K], or [E, N, K]: the panels of one expert follow those of another.
struct PackedWeight {
  const uint8_t* lines;
  const void* scales;
  ScalarType scale_dtype;
  const uint8_t* zeros;  // of int4, or null
  Encoding encoding;
  int32_t offset;  // the zero point if `zeros` is null
  int64_t N, K, group, block, blocks, groups, panels, panel_bytes;

  PackedWeight(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero,
               int64_t encoding, int64_t N, int64_t K, int64_t group)
      : lines(read<uint8_t>(packed)),
        scales(scale.const_data_ptr()),
        scale_dtype(scale.scalar_type()),
        zeros(zero ? read<uint8_t>(*zero) : nullptr),
        encoding(static_cast<Encoding>(encoding)),
        offset(encoding == kInt4 ? 8 : 0),
        N(N),
        K(K),
        group(group),
        block(block_of(this->encoding, K, group)),
        blocks((K + block - 1) / block),
        groups(group ? blocks : 1),
        panels((N + kPanelWidth - 1) / kPanelWidth),
        panel_bytes(blocks * block * kPanelWidth * (encoding == kBf16 ? 2 : 1) /
                    (encoding == kInt4 ? 2 : 1)) {}

  const uint8_t* panel(int64_t t) const { return lines + t * panel_bytes; }
  int64_t index(int64_t t, int64_t g, int64_t part) const {
    return ((t * groups + g) * kParts + part) * kLanes;
  }
  f32v scale(int64_t t, int64_t g, int64_t part) const {
    const int64_t i = index(t, g, part);
    if (scale_dtype == ScalarType::Float) return load(static_cast<const float*>(scales) + i);
    if (scale_dtype == ScalarType::Half) return load(static_cast<const fp16*>(scales) + i);
    return load(static_cast<const bf16*>(scales) + i);
  }
  // The zero points of a group, per channel.
  i32v zero(int64_t t, int64_t g, int64_t part) const {
    if (!zeros) return offset + i32v{};
    typedef uint8_t u8v __attribute__((vector_size(kLanes)));
    u8v z;
    std::memcpy(&z, zeros + index(t, groups == 1 ? 0 : g, part), sizeof z);
    return __builtin_convertvector(z, i32v);
  }

  // Calls f with a value of the encoding's type.
  template <class Call>
  void with_format(Call&& f) const {
    if (encoding == kInt8) return f(Int8{});
    if (encoding == kInt4) return f(Int4{});
    if (encoding == kFp8) return f(Fp8{});
    f(Bf16{});
  }
};

}  // namespace Q3N_LEVEL
