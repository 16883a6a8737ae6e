#include "ops.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

void output_gate(Tensor x_, Tensor gate) {
  const int64_t T = x_.size(0), H = x_.size(1), D = x_.size(2);
  const int64_t token_stride = gate.stride(0), head_stride = gate.stride(1);
  with_activations(x_, [&]<class A>(A) {
    A* xs = write<A>(x_);
    const A* gates = read<A>(gate);
    parallel(T * H, grain_of(D), [&](int64_t i) {
      A* x = xs + i * D;
      const A* g = gates + i / H * token_stride + i % H * head_stride;
      for_vectors(D, [&](int64_t d, int64_t lanes) {
        store(x + d, load(x + d, lanes) * sigmoid(load(g + d, lanes)), lanes);
      });
    });
  });
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(output_gate)
