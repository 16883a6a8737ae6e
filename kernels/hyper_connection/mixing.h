// What a hyper-connection computes besides its two products.
#pragma once

#include "streams.h"

namespace Q3N_LEVEL {

// x [T, hc * D]: the normalised streams, after the block's output is added to them.
template <class T>
Tensor normalise_streams(const Streams<T>& in, const Tensor& like, const Tensor& norm, float eps) {
  Tensor x = empty_as(like, {in.tokens, in.hc * in.D});
  with_parameter<T>(norm, [&]<class W>(W) {
    in.each([&](int64_t t, int64_t s) {
      T* out = write<T>(x) + (t * in.hc + s) * in.D;
      normalise(out, in.added(t, s), read<W>(norm) + s * in.D, in.D, eps);
    });
  });
  return x;
}

// injection [T, hc] = 2 sigmoid(inject x / hc); [T, 0] without `inject`.
template <class T>
Tensor injections(const Streams<T>& in, const Tensor& x, const std::optional<Tensor>& inject) {
  Tensor out = empty_as(x, {in.tokens, inject ? in.hc : 0}, ScalarType::Float);
  if (!inject) return out;
  const int64_t K = in.hc * in.D;
  with_parameter<T>(*inject, [&]<class W>(W) {
    in.each([&](int64_t t, int64_t s) {
      const float product = dot(read<T>(x) + t * K, read<W>(*inject) + s * K, K);
      write<float>(out)[t * in.hc + s] = (2.0f * sigmoid(splat(product / in.hc)))[0];
    });
  });
  return out;
}

// hidden = silu(down x / hc), rounded, for n products.
template <class T>
void activate(T* hidden, const float* products, int64_t n, int64_t hc) {
  const f32v streams = splat(static_cast<float>(hc));
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    store(hidden + i, silu(load(products + i, lanes) / streams), lanes);
  });
}

// mixed += sigmoid(gate) x, for n features of a stream.
template <class T>
void mix(float* mixed, const float* gate, const T* x, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const f32v gated = sigmoid(load(gate + i, lanes)) * load(x + i, lanes);
    store(mixed + i, load(mixed + i, lanes) + gated, lanes);
  });
}

// out = mixed / hc, for n features.
template <class T>
void write_mean(T* out, const float* mixed, int64_t n, int64_t hc) {
  const f32v streams = splat(static_cast<float>(hc));
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    store(out + i, load(mixed + i, lanes) / streams, lanes);
  });
}

}  // namespace Q3N_LEVEL
