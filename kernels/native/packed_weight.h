// Packed weights, as kernels/linear/pack.py writes them: panels of 16 output channels, stored in
// lines of 64 bytes, each a few columns of K.
#pragma once

#include <numeric>
#include <optional>

#include "formats.h"
#include "tensor.h"

namespace Q3N_LEVEL {

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
  int64_t before;  // rows of 16 entries before a panel's scales: of NVFP4, the channels' fp32

  PackedWeight(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero,
               int64_t encoding, int64_t N, int64_t K, int64_t group)
      : lines(read<uint8_t>(packed)),
        scales(scale.const_data_ptr()),
        scale_dtype(scale.scalar_type()),
        zeros(zero ? read<uint8_t>(*zero) : nullptr),
        encoding(static_cast<Encoding>(encoding)),
        offset(encoding == kInt4        ? 8
               : is_fp4(this->encoding) ? kFp4Offset
                                        : kInt8Offset),
        N(N),
        K(K),
        group(group),
        block(block_of(this->encoding, K, group)),
        blocks((K + block - 1) / block),
        groups(group ? blocks : 1),
        panels((N + kPanelWidth - 1) / kPanelWidth),
        panel_bytes(blocks * block * kPanelWidth * (encoding == kBf16 ? 2 : 1) /
                    (in_nibbles(this->encoding) ? 2 : 1)),
        before(encoding == kNvfp4 ? sizeof(float) : 0) {}

  const uint8_t* panel(int64_t t) const { return lines + t * panel_bytes; }
  int64_t index(int64_t t, int64_t g, int64_t part) const {
    return ((t * (before + groups) + before + g) * kParts + part) * kLanes;
  }
  f32v scale(int64_t t, int64_t g, int64_t part) const {
    const int64_t i = index(t, g, part);
    if (is_fp4(encoding)) return scale_of_fp4(static_cast<const uint8_t*>(scales) + i);
    if (scale_dtype == ScalarType::Float) return load(static_cast<const float*>(scales) + i);
    if (scale_dtype == ScalarType::Half) return load(static_cast<const fp16*>(scales) + i);
    return load(static_cast<const bf16*>(scales) + i);
  }
  // From e4m3 (NVFP4), or powers of two of which the smallest is a denormal (MXFP4).
  f32v scale_of_fp4(const uint8_t* codes) const {
    const u32v code = (u32v)widen(codes);
    if (encoding == kNvfp4) return (f32v)(code << 20) * 0x1p120f;  // positive
    const u32v bits = code << 23;
    return (f32v)(code == 0 ? (u32v)(0x00400000 + i32v{}) : bits);
  }
  // Whether totals are multiplied by a scale of each channel, and that scale.
  bool ends_with_scale() const { return encoding == kNvfp4 || (!group && encoding != kBf16); }
  f32v last_scale(int64_t t, int64_t part) const {
    if (encoding != kNvfp4) return scale(t, 0, part);
    const auto* panel = static_cast<const uint8_t*>(scales) + index(t, -before, 0);
    return load(reinterpret_cast<const float*>(panel) + part * kLanes);
  }
  // The zero points of a group, per channel.
  i32v zero(int64_t t, int64_t g, int64_t part) const {
    if (!zeros) return offset + i32v{};
    return widen(zeros + index(t, groups == 1 ? 0 : g, part));
  }

  // Whether x of type T is multiplied as it is.
  template <class T>
  bool in_pairs() const {
    return (kInPairs<T> && encoding == kBf16) || (kFp8InPairs<T> && encoding == kFp8);
  }

  // Calls f with a value of the type of the encoding, and of x.
  template <class T, class Call>
  void with_format(Call&& f) const {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    if constexpr (kInPairs<T>) {
      if (encoding == kBf16) return f(Bf16Pairs{});
    }
#endif
#if defined(__AVX512BF16__)
    if constexpr (kFp8InPairs<T>) {
      if (encoding == kFp8) return f(Fp8Pairs{});
    }
#endif
    if (encoding == kInt8) return f(Int8{});
    if (encoding == kInt4) return f(Int4{});
    if (is_fp4(encoding)) return f(Fp4{});
    if (encoding == kFp8) return f(Fp8{});
    f(Bf16{});
  }
};

}  // namespace Q3N_LEVEL
