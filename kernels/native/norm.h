// Zero-centred norms of a row.
#pragma once

#include "simd.h"

namespace Q3N_LEVEL {

// rsqrt(mean x^2 + eps), in every lane.
template <class T>
f32v norm_scale(const T* x, int64_t D, float eps) {
  return splat(1.0f / std::sqrt(sum_of_squares(x, D) / D + eps));
}

// out = x * rsqrt(mean x^2 + eps) * (1 + weight)
template <class T, class W>
void normalise(T* out, const T* x, const W* weight, int64_t D, float eps) {
  const f32v scale = norm_scale(x, D, eps);
  for_vectors(D, [&](int64_t i, int64_t lanes) {
    store(out + i, load(x + i, lanes) * scale * (1.0f + load(weight + i, lanes)), lanes);
  });
}

// out = RoPE(x * rsqrt(mean x^2 + eps) * (1 + weight)); x1, x2 are the halves of the rotated part.
template <class T, class W, class C>
void normalise_rotate(T* out, const T* x, const W* weight, const C* cos_sin, int64_t D,
                      int64_t rotary, float eps) {
  const f32v scale = norm_scale(x, D, eps);
  const auto normed = [&](int64_t i, int64_t lanes) {
    return load(x + i, lanes) * scale * (1.0f + load(weight + i, lanes));
  };
  const int64_t half = rotary / 2;
  for_vectors(half, [&](int64_t i, int64_t lanes) {
    const f32v x1 = normed(i, lanes), x2 = normed(half + i, lanes);
    const f32v cos = load(cos_sin + i, lanes), sin = load(cos_sin + half + i, lanes);
    store(out + i, x1 * cos - x2 * sin, lanes);
    store(out + half + i, x2 * cos + x1 * sin, lanes);
  });
  for_vectors(D - rotary, [&](int64_t i, int64_t lanes) {
    store(out + rotary + i, normed(rotary + i, lanes), lanes);
  });
}

}  // namespace Q3N_LEVEL
