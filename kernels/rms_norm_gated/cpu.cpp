#include "norm.h"
#include "ops.h"
#include "parts.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

template <class T, class W>
void normalise_gated(T* out, const T* x, const T* z, const W* weight, int64_t V, float eps,
                     bool sigmoid_gate) {
  const f32v scale = norm_scale(x, V, eps);
  for_vectors(V, [&](int64_t i, int64_t lanes) {
    const f32v normed = load(x + i, lanes) * scale * load(weight + i, lanes);
    const f32v gate = load(z + i, lanes);
    store(out + i, normed * (sigmoid_gate ? sigmoid(gate) : silu(gate)), lanes);
  });
}

}  // namespace

void rms_norm_gated_to(Tensor out, Tensor x, Tensor z, Tensor weight, double eps,
                       bool sigmoid_gate) {
  const int64_t T = x.size(0), H = x.size(1), R = x.size(2), V = x.size(3);
  const auto xs = x.strides(), zs = z.strides();
  with_dtypes(x, weight, [&]<class A, class W>(A, W) {
    const A *x0 = read<A>(x), *z0 = read<A>(z);
    const W* w = read<W>(weight);
    A* outs = write<A>(out);
    parallel(T * H * R, grain_of(V), [&](int64_t i) {
      const int64_t r = i % R, h = i / R % H, t = i / R / H;
      normalise_gated(outs + i * V, x0 + t * xs[0] + h * xs[1] + r * xs[2],
                      z0 + t * zs[0] + h * zs[1] + r * zs[2], w, V, static_cast<float>(eps),
                      sigmoid_gate);
    });
  });
}

Tensor rms_norm_gated(Tensor x, Tensor z, Tensor weight, double eps, bool sigmoid_gate) {
  Tensor out = empty_as(x, {x.size(0), x.size(1) * x.size(2) * x.size(3)});
  rms_norm_gated_to(out, x, z, weight, eps, sigmoid_gate);
  return out;
}

}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(rms_norm_gated)
