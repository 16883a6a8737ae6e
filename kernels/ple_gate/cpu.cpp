#include "ops.h"
#include "streams.h"

namespace Q3N_LEVEL {
namespace {

// norm_key(key) . norm_query(query) / sqrt(D).
template <class T, class W>
float score(const T* query, const W* query_norm, const T* key, const W* key_norm, int64_t D,
            float eps) {
  const f32v query_scale = norm_scale(query, D, eps), key_scale = norm_scale(key, D, eps);
  f32v total{};
  for_vectors(D, [&](int64_t i, int64_t lanes) {
    const f32v q = load(query + i, lanes) * query_scale * (1.0f + load(query_norm + i, lanes));
    const f32v k = load(key + i, lanes) * key_scale * (1.0f + load(key_norm + i, lanes));
    total = fma(k, q, total);
  });
  return sum(total) / std::sqrt(static_cast<float>(D));
}

// sigmoid(sign(score) sqrt(max(|score|, 1e-6))), in every lane.
inline f32v gate(float score) {
  const float root = std::sqrt(std::max(std::abs(score), 1e-6f));
  return sigmoid(splat(score > 0.0f ? root : score < 0.0f ? -root : score));
}

std::tuple<Tensor, Tensor> ple_gate(Tensor streams_, std::optional<Tensor> block,
                                    std::optional<Tensor> injection, Tensor keys, Tensor values,
                                    Tensor query_norm, Tensor key_norm, Tensor conv_norm,
                                    double eps) {
  const int64_t T = streams_.size(0), hc = streams_.size(1), D = streams_.size(2);
  Tensor gated = empty_as(streams_, {T, hc * D});
  Tensor normed = empty_as(streams_, {T, hc * D});
  with_dtypes(streams_, query_norm, [&]<class A, class W>(A, W) {
    const Streams<A> in(streams_, block, injection);
    const float epsilon = static_cast<float>(eps);
    in.each([&](int64_t t, int64_t s) {
      const W *query = read<W>(query_norm) + s * D, *key = read<W>(key_norm) + s * D;
      const f32v g = gate(score(in.added(t, s), query, read<A>(keys) + t * keys.stride(0) + s * D,
                                key, D, epsilon));
      const A* value = read<A>(values) + t * values.stride(0);
      A* out = write<A>(gated) + (t * hc + s) * D;
      for_vectors(
          D, [&](int64_t i, int64_t lanes) { store(out + i, g * load(value + i, lanes), lanes); });
      normalise(write<A>(normed) + (t * hc + s) * D, out, read<W>(conv_norm) + s * D, D, epsilon);
    });
  });
  return {gated, normed};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(ple_gate)
