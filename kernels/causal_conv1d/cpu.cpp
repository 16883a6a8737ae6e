#include "arguments.h"
#include "convolution.h"
#include "ops.h"
#include "parts.h"

namespace Q3N_LEVEL {

Tensor causal_conv1d(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor conv_, Tensor span,
                     Tensor query_start_loc, Tensor slot, Tensor context_len) {
  const Arguments arguments{"causal_conv1d"};
  arguments.expect_dims("q", q, 3);
  arguments.expect_dims("v", v, 3);
  arguments.expect_dims("conv_", conv_, 3);
  arguments.expect_dims("span", span, 2);
  const int64_t T = q.size(0), H = q.size(1), K = q.size(2), R = v.size(2);
  const int64_t C = H * (2 * K + R), ring = conv_.size(1), drafts = ring - kWidth;
  const ScalarType dtype = q.scalar_type();
  arguments.require(drafts >= 0, "conv_ holds ", ring, " inputs, fewer than the ", kWidth,
                    " of a convolution");
  arguments.expect("q", q, {T, H, K}, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  arguments.expect("k", k, {T, H, K}, {dtype});
  arguments.expect("v", v, {T, H, R}, {dtype});
  const ConvArguments in{weight, conv_, span, query_start_loc, slot, context_len};
  const auto rows = in.checked(arguments, q, C, drafts);
  Tensor out = empty_as(q, {T, C});
  with_activations(q, [&]<class A>(A) {
    const Conv<A> conv(in, out, 1);
    const auto segment = [&](int64_t i) -> Segment<A> {
      const int64_t part = i / H, h = i % H;
      if (part == 0) return {read<A>(q) + h * q.stride(1), q.stride(0), h * K, K};
      if (part == 1) return {read<A>(k) + h * k.stride(1), k.stride(0), (H + h) * K, K};
      return {read<A>(v) + h * v.stride(1), v.stride(0), 2 * H * K + h * R, R};
    };
    convolve_rows(conv, rows, T, 3 * H, segment);
  });
  return out;
}

}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(causal_conv1d)
