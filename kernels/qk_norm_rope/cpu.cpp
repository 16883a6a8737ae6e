#include "norm.h"
#include "ops.h"
#include "positions.h"

namespace Q3N_LEVEL {
namespace {

std::tuple<Tensor, Tensor> qk_norm_rope(Tensor qkv, Tensor q_weight, Tensor k_weight,
                                        Tensor cos_sin, Tensor positions, int64_t num_heads,
                                        int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim,
                                        double eps) {
  const int64_t T = qkv.size(0), stride = qkv.stride(0), D = head_dim;
  const int64_t cos_sin_stride = cos_sin.stride(0), heads = num_heads + num_kv_heads;
  const int64_t* position = read<int64_t>(positions);
  check_positions("position", positions, cos_sin);
  Tensor q = empty_as(qkv, {T, num_heads * D});
  Tensor k = empty_as(qkv, {T, num_kv_heads * D});
  with_dtypes(qkv, q_weight, [&]<class A, class W>(A, W) {
    with_parameter<A>(cos_sin, [&]<class C>(C) {
      const A* rows = read<A>(qkv);
      const W *qw = read<W>(q_weight), *kw = read<W>(k_weight);
      const C* table = read<C>(cos_sin);
      A *qs = write<A>(q), *ks = write<A>(k);
      parallel(T * heads, grain_of(D), [&](int64_t i) {
        const int64_t t = i / heads, h = i % heads, kv = h - num_heads;
        const C* angles = table + position[t] * cos_sin_stride;
        const A* row = rows + t * stride;
        if (kv < 0) {
          normalise_rotate(qs + (t * num_heads + h) * D, row + h * 2 * D, qw, angles, D, rotary_dim,
                           static_cast<float>(eps));
        } else {
          normalise_rotate(ks + (t * num_kv_heads + kv) * D, row + (2 * num_heads + kv) * D, kw,
                           angles, D, rotary_dim, static_cast<float>(eps));
        }
      });
    });
  });
  return {q, k};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(qk_norm_rope)
