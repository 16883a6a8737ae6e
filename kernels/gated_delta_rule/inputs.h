// Inputs of the recurrence, and access to the state pages.
#pragma once

#include <vector>

#include "state.h"

namespace Q3N_LEVEL {

constexpr float kNormEps = 1e-6f;

struct DeltaDims {
  int64_t T, H, HV, K, V, W;
  int64_t group() const { return HV / H; }
};

template <class T>
struct Inputs {
  DeltaDims dims;
  const T *q, *k, *v, *a, *b;
  int64_t q_stride[2], k_stride[2], v_stride[2], a_stride[2], b_stride[2];  // of token and head
  T* out;                                                                   // [T, HV, V]
  float *g, *beta;                                                          // [T, HV]: see gates

  void query(int64_t token, int64_t head, float* to) const {
    normalised(q + token * q_stride[0] + head * q_stride[1], 1.0f / std::sqrt(float(dims.K)), to);
  }

  void key(int64_t token, int64_t head, float* to) const {
    normalised(k + token * k_stride[0] + head * k_stride[1], 1.0f, to);
  }

 private:
  void normalised(const T* x, float scale, float* to) const {
    const f32v norm = splat(scale / std::sqrt(sum_of_squares(x, dims.K) + kNormEps));
    for_vectors(dims.K,
                [&](int64_t i, int64_t lanes) { store(to + i, load(x + i, lanes) * norm, lanes); });
  }
};

// g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b) of one token. rate [HV]: -exp(A_log).
template <class T>
void gates(const Inputs<T>& in, int64_t token, const float* rate, const float* dt_bias) {
  const DeltaDims& d = in.dims;
  const int64_t R = d.group();
  float *g = in.g + token * d.HV, *beta = in.beta + token * d.HV;
  for (int64_t h = 0; h < d.H; ++h) {
    const T* a = in.a + token * in.a_stride[0] + h * in.a_stride[1];
    const T* b = in.b + token * in.b_stride[0] + h * in.b_stride[1];
    for (int64_t r = 0; r < R; ++r) {
      g[h * R + r] = static_cast<float>(a[r]);
      beta[h * R + r] = static_cast<float>(b[r]);
    }
  }
  for_vectors(d.HV, [&](int64_t i, int64_t lanes) {
    const f32v time_step = softplus(load(g + i, lanes) + load(dt_bias + i, lanes));
    store(g + i, load(rate + i, lanes) * time_step, lanes);
    store(beta + i, sigmoid(load(beta + i, lanes)), lanes);
  });
}

// The state pages; dim 0 of each tensor is the slot. The window is a ring of W tokens: position p
// is at p % W.
template <class S>
struct Pages {
  DeltaDims dims;
  S* state_base;
  float *key_base, *u_base, *g_base;
  int32_t* span_base;
  int64_t state_stride, key_stride, u_stride, g_stride, span_stride;

  S* state(const Row& row, int64_t head) const {  // [K, V]
    return state_base + row.slot * state_stride + head * dims.K * dims.V;
  }
  float* key(const Row& row, int64_t p, int64_t head) const {  // [K]
    return key_base + row.slot * key_stride + (p % dims.W * dims.H + head) * dims.K;
  }
  float* u(const Row& row, int64_t p, int64_t head) const {  // [V]
    return u_base + row.slot * u_stride + (p % dims.W * dims.HV + head) * dims.V;
  }
  float* g(const Row& row, int64_t p) const {  // [HV]
    return g_base + row.slot * g_stride + p % dims.W * dims.HV;
  }
  void set_span(const Row& row) const {
    int32_t* span = span_base + row.slot * span_stride;
    span[0] = static_cast<int32_t>(row.certain());
    span[1] = static_cast<int32_t>(row.end());
  }
  // The first of the row's positions that the window keeps. Earlier ones are in S, which is at the
  // last grid point whose tokens are all final.
  int64_t first_kept(const Row& row) const {
    return std::max(row.context, grid_point(row.certain()));
  }
};

}  // namespace Q3N_LEVEL
