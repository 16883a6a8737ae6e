#include "norm.h"
#include "ops.h"
#include "parts.h"

namespace Q3N_LEVEL {
namespace {

// residual += x, rounded to its dtype.
template <class T>
void add_to(T* residual, const T* x, int64_t D) {
  for_vectors(D, [&](int64_t i, int64_t lanes) {
    store(residual + i, load(residual + i, lanes) + load(x + i, lanes), lanes);
  });
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps, std::optional<Tensor> residual_) {
  const int64_t T = x.size(0), D = x.size(1), stride = x.stride(0);
  const int64_t residual_stride = residual_ ? residual_->stride(0) : 0;
  Tensor out = empty_as(x, {T, D});
  with_dtype(x, [&]<class A>(A) {
    with_parameter<A>(weight, [&]<class W>(W) {
      const A* xs = read<A>(x);
      const W* w = read<W>(weight);
      A* residuals = residual_ ? write<A>(*residual_) : nullptr;
      A* outs = write<A>(out);
      parallel(T, grain_of(D), [&](int64_t t) {
        const A* row = xs + t * stride;
        if (residuals) {
          A* residual = residuals + t * residual_stride;
          add_to(residual, row, D);
          row = residual;
        }
        normalise(outs + t * D, row, w, D, static_cast<float>(eps));
      });
    });
  });
  return out;
}

}  // namespace Q3N_LEVEL

Q3N_OP(rms_norm)
