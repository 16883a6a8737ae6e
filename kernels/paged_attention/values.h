// Weighted sums of values, a register tile of partials and columns at a time.
#pragma once

#include "simd.h"

namespace Q3N_LEVEL {

constexpr int64_t kMaxDim = 256;
// Elements of the kv heads that a tile takes together, because they are contiguous in memory.
template <class T>
constexpr int64_t kMaxRow = std::max<int64_t>(kMaxDim, 1024 / sizeof(T));
constexpr int64_t kColumns = 2 * kLanes;  // columns of a tile
// Partials of a tile: 16 accumulators, or 8 of 16 registers.
constexpr int kWeighed = kRegisters == 32 ? 8 : 4;

// One step of a weighted sum: how many positions it takes, and how it loads weights and values.
template <class T>
struct Values {
  using Weight = float;
  using type = f32v;
  static constexpr int64_t kCount = 1;
  static void load(const T* const* rows, int64_t c, f32v (&v)[2]) {
    v[0] = Q3N_LEVEL::load(rows[0] + c), v[1] = Q3N_LEVEL::load(rows[0] + c + kLanes);
  }
  static void load(const T* const* rows, int64_t c, f32v (&v)[2], int64_t n) {  // the masked tail
    v[0] = Q3N_LEVEL::load(rows[0] + c, std::min<int64_t>(n, kLanes));
    v[1] = n > kLanes ? Q3N_LEVEL::load(rows[0] + c + kLanes, n - kLanes) : f32v{};
  }
  static f32v weight(const float* w) { return splat(*w); }
  static f32v add(f32v w, f32v v, f32v sum) { return fma(w, v, sum); }
  static void in_order(f32v (&)[2]) {}
};

#if defined(__AVX512BF16__)
template <>
struct Values<bf16> {  // positions in pairs; columns stay in the order that unpacking gives
  using Weight = bf16;
  using type = __m512bh;
  static constexpr int64_t kCount = 2;
  template <class... Count>
  static void load(const bf16* const* rows, int64_t c, __m512bh (&v)[2], Count... n) {
    const __m512i even = (__m512i)Terms<bf16>::load(rows[0] + c, n...);
    const __m512i odd = (__m512i)Terms<bf16>::load(rows[1] + c, n...);
    v[0] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
    v[1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
  }
  static __m512bh weight(const bf16* w) {
    int32_t pair;
    std::memcpy(&pair, w, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static f32v add(__m512bh w, __m512bh v, f32v sum) {
    return (f32v)_mm512_dpbf16_ps((__m512)sum, w, v);
  }
  static void in_order(f32v (&v)[2]) {
    const f32v low = v[0], high = v[1];
    v[0] =
        __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    v[1] = __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29,
                                   30, 31);
  }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Values<bf16> {  // positions in pairs
  using Weight = bf16;
  using type = bfloat16x8_t;
  static constexpr int64_t kCount = 2;
  template <class... Count>
  static void load(const bf16* const* rows, int64_t c, type (&v)[2], Count... n) {
    const uint16x8_t even = vreinterpretq_u16_bf16(Terms<bf16>::load(rows[0] + c, n...));
    const uint16x8_t odd = vreinterpretq_u16_bf16(Terms<bf16>::load(rows[1] + c, n...));
    v[0] = vreinterpretq_bf16_u16(vzip1q_u16(even, odd));
    v[1] = vreinterpretq_bf16_u16(vzip2q_u16(even, odd));
  }
  static type weight(const bf16* w) {
    uint32_t pair;
    std::memcpy(&pair, w, sizeof pair);
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  static f32v add(type w, type v, f32v sum) { return Terms<bf16>::add(w, v, sum); }
  static void in_order(f32v (&)[2]) {}
};
#endif

template <class T>
using Weight = typename Values<T>::Weight;

// Keys to prefetch while values are summed: `bytes` of one every `pace` positions.
template <class T>
struct Prefetch {
  const T* const* row;
  int64_t left, pace, bytes;

  void next() {
    if (left > 0) prefetch(*row++, bytes), --left;
  }
};

// out[r][0 .. kColumns) = sum_i w[r][i] value_i[c ..], for R partials and the first n values.
// columns: fewer than kColumns in a masked tail.
template <int R, class T, class... Count>
void weigh_tile(const Weight<T>* w, int64_t w_stride, const T* const* value, int64_t n, int64_t c,
                Prefetch<T>& ahead, float* out, int64_t out_stride, Count... columns) {
  using V = Values<T>;
  alignas(64) static const T zeros[kMaxRow<T>] = {};
  f32v total[R][2] = {};
  const auto add = [&](int64_t i, const T* const* rows) Q3N_INLINE {
    typename V::type v[2];
    V::load(rows, c, v, columns...);
    repeat<R>(R, [&](int64_t r) Q3N_INLINE {
      const typename V::type weight = V::weight(w + r * w_stride + i);
      total[r][0] = V::add(weight, v[0], total[r][0]);
      total[r][1] = V::add(weight, v[1], total[r][1]);
    });
  };
  const int64_t whole = n / V::kCount * V::kCount;
  for (int64_t i = 0; i < whole;) {
    ahead.next();
    for (const int64_t end = std::min(i + ahead.pace, whole); i < end; i += V::kCount) {
      add(i, value + i);
    }
  }
  if (whole < n) {  // half a pair
    const T* const rows[2] = {value[whole], zeros};
    add(whole, rows);
  }
  repeat<R>(R, [&](int64_t r) Q3N_INLINE {
    V::in_order(total[r]);
    store(out + r * out_stride, total[r][0]);
    store(out + r * out_stride + kLanes, total[r][1]);
  });
}

// weigh_tile for `count` partials, at most R, of whole tiles.
template <class T, int R = kWeighed>
void weigh_tiles(int64_t count, const Weight<T>* w, int64_t w_stride, const T* const* value,
                 int64_t n, int64_t c, Prefetch<T>& ahead, float* out, int64_t out_stride) {
  if constexpr (R > 1) {
    if (count < R) {
      return weigh_tiles<T, R - 1>(count, w, w_stride, value, n, c, ahead, out, out_stride);
    }
  }
  weigh_tile<R, T>(w, w_stride, value, n, c, ahead, out, out_stride);
}

// out[r] = sum_i w[r][i] value_i[first .. first + D), padded to kColumns.
template <class T>
void weigh(const Weight<T>* w, int64_t w_stride, int64_t partials, const T* const* value, int64_t n,
           int64_t first, int64_t D, Prefetch<T>& ahead, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < partials; r += kWeighed) {
    const int64_t count = std::min<int64_t>(kWeighed, partials - r);
    for (int64_t c = 0; c + kColumns <= D; c += kColumns) {
      weigh_tiles<T>(count, w + r * w_stride, w_stride, value, n, first + c, ahead,
                     out + r * out_stride + c, out_stride);
    }
  }
  const int64_t whole = D / kColumns * kColumns;
  for (int64_t r = 0; whole < D && r < partials; ++r) {  // one by one: few models have such heads
    weigh_tile<1, T>(w + r * w_stride, w_stride, value, n, first + whole, ahead,
                     out + r * out_stride + whole, out_stride, D - whole);
  }
}

}  // namespace Q3N_LEVEL
