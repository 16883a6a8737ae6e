#include "ops.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

Tensor silu_and_mul(Tensor x) {
  const int64_t T = x.size(0), I = x.size(1) / 2, stride = x.stride(0);
  Tensor out = empty_as(x, {T, I});
  with_activations(x, [&]<class A>(A) {
    const A* xs = read<A>(x);
    A* outs = write<A>(out);
    parallel(T, grain_of(I), [&](int64_t t) {
      const A *gate = xs + t * stride, *up = gate + I;
      for_vectors(I, [&](int64_t i, int64_t lanes) {
        store(outs + t * I + i, silu(load(gate + i, lanes)) * load(up + i, lanes), lanes);
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(silu_and_mul)
