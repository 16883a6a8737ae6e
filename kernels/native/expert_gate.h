// The shared expert's gate.
#pragma once

#include "simd.h"

namespace Q3N_LEVEL {

// sigmoid(x . weight), in every lane.
template <class T, class W>
f32v gate(const T* x, const W* weight, int64_t D) {
  f32v total{};
  for_vectors(D, [&](int64_t i, int64_t lanes) {
    total = fma(load(x + i, lanes), load(weight + i, lanes), total);
  });
  return sigmoid(splat(sum(total)));
}

}  // namespace Q3N_LEVEL
