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
    constexpr int64_t kTokens = 4;  // of a task
    const T* xs = read<T>(x);
    const auto write_gate = [&](int64_t t, int64_t s, float product) {
      write<float>(out)[t * in.hc + s] = (2.0f * sigmoid(splat(product / in.hc)))[0];
    };
    const int64_t tasks = (in.tokens + kTokens - 1) / kTokens * in.hc;
    parallel(tasks, grain_of(std::min(kTokens, in.tokens) * K), [&](int64_t i) {
      const int64_t s = i % in.hc, begin = i / in.hc * kTokens;
      const int64_t end = std::min(begin + kTokens, in.tokens);
      const W* row = read<W>(*inject) + s * K;
      if (end - begin == kTokens) {
        float products[kTokens];
        dots<kTokens>(xs + begin * K, K, row, K, products);
        for (int64_t t = begin; t < end; ++t) write_gate(t, s, products[t - begin]);
      } else {
        for (int64_t t = begin; t < end; ++t) write_gate(t, s, dot(xs + t * K, row, K));
      }
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

// mixed = mean over the streams s of sigmoid(gate(s, …)) x_s, for n features; streams are D apart.
template <class T, class F>
void mix(T* mixed, F&& gate, const T* x, int64_t hc, int64_t D, int64_t n) {
  const f32v streams = splat(static_cast<float>(hc));
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    f32v sum{};
    for (int64_t s = 0; s < hc; ++s) {
      sum += sigmoid(gate(s, i, lanes)) * load(x + s * D + i, lanes);
    }
    store(mixed + i, sum / streams, lanes);
  });
}

}  // namespace Q3N_LEVEL
