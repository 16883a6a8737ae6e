#include "expert_gate.h"
#include "ops.h"
#include "tensor.h"

namespace Q3N_LEVEL {
namespace {

// shared = gate * shared, plus routed if there is one.
template <class T>
void apply(T* shared, const T* routed, f32v gate, int64_t D) {
  for_vectors(D, [&](int64_t i, int64_t lanes) {
    const f32v gated = gate * load(shared + i, lanes);
    store(shared + i, routed ? gated + load(routed + i, lanes) : gated, lanes);
  });
}

void shared_expert_gate(Tensor x, Tensor weight, Tensor shared_, std::optional<Tensor> routed) {
  const int64_t T = x.size(0), D = x.size(1);
  const int64_t x_stride = x.stride(0), shared_stride = shared_.stride(0);
  const int64_t routed_stride = routed ? routed->stride(0) : 0;
  with_dtypes(x, weight, [&]<class A, class W>(A, W) {
    const A* xs = read<A>(x);
    const W* w = read<W>(weight);
    A* shared = write<A>(shared_);
    const A* other = routed ? read<A>(*routed) : nullptr;
    parallel(T, grain_of(D), [&](int64_t t) {
      apply(shared + t * shared_stride, other ? other + t * routed_stride : nullptr,
            gate(xs + t * x_stride, w, D), D);
    });
  });
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(shared_expert_gate)
