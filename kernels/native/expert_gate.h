// The shared expert's gate.
#pragma once

#include "simd.h"

namespace Q3N_LEVEL {

// sigmoid(x . weight), in every lane.
template <class T, class W>
f32v gate(const T* x, const W* weight, int64_t D) {
  return sigmoid(splat(dot(x, weight, D)));
}

}  // namespace Q3N_LEVEL
