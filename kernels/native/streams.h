// The streams of a hyper-connection [T, hc, D]: a block's output is added to them, and they are
// normalised, each by itself.
#pragma once

#include <optional>
#include <vector>

#include "norm.h"
#include "tensor.h"

namespace Q3N_LEVEL {

template <class T>
struct Streams {
  T* streams;
  int64_t tokens, hc, D, stride;  // `stride` apart
  const T* block = nullptr;       // [T, D], or null: nothing is added
  int64_t block_stride = 0;
  const float* injection = nullptr;  // [T, hc], or null: 1

  Streams(const Tensor& streams_, const std::optional<Tensor>& added,
          const std::optional<Tensor>& weights)
      : streams(write<T>(streams_)),
        tokens(streams_.size(0)),
        hc(streams_.size(1)),
        D(streams_.size(2)),
        stride(streams_.stride(0)) {
    if (added) block = read<T>(*added), block_stride = added->stride(0);
    if (weights) injection = read<float>(*weights);
  }

  T* at(int64_t t, int64_t s) const { return streams + t * stride + s * D; }

  // Stream s of token t, after the block's output is added to it, rounded.
  const T* added(int64_t t, int64_t s) const {
    T* stream = at(t, s);
    if (!block) return stream;
    const f32v weight = splat(injection ? injection[t * hc + s] : 1.0f);
    const T* output = block + t * block_stride;
    for_vectors(D, [&](int64_t i, int64_t lanes) {
      store(stream + i, fma(weight, load(output + i, lanes), load(stream + i, lanes)), lanes);
    });
    return stream;
  }

  // Calls f(t, s) for every stream of every token.
  template <class F>
  void each(F&& f) const {
    parallel(tokens * hc, grain_of(D), [&](int64_t i) { f(i / hc, i % hc); });
  }
};

}  // namespace Q3N_LEVEL
