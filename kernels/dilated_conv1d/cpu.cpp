#include "arguments.h"
#include "convolution.h"
#include "ops.h"

namespace Q3N_LEVEL {
namespace {

constexpr int64_t kSegment = 1024;  // channels that one task convolves

Tensor dilated_conv1d(Tensor x, Tensor weight, int64_t dilation, Tensor conv_, Tensor span,
                      Tensor query_start_loc, Tensor slot, Tensor context_len) {
  const Arguments arguments{"dilated_conv1d"};
  arguments.expect_dims("x", x, 2);
  arguments.expect_dims("conv_", conv_, 3);
  arguments.expect_dims("span", span, 2);
  const int64_t T = x.size(0), C = x.size(1), ring = conv_.size(1);
  arguments.require(dilation >= 1 && dilation <= (ring - 1) / kHistory, "conv_ holds ", ring,
                    " inputs, too few for dilation ", dilation);
  const int64_t drafts = ring - kHistory * dilation - 1;
  arguments.expect("x", x, {T, C}, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  const ConvArguments in{weight, conv_, span, query_start_loc, slot, context_len};
  const auto rows = in.checked(arguments, x, C, drafts);
  Tensor out = empty_as(x, {T, C});
  with_activations(x, [&]<class A>(A) {
    const Conv<A> conv(in, out, dilation);
    const auto segment = [&](int64_t i) -> Segment<A> {
      const int64_t first = i * kSegment;
      return {read<A>(x) + first, x.stride(0), first, std::min(kSegment, C - first)};
    };
    convolve_rows(conv, rows, T, (C + kSegment - 1) / kSegment, segment);
  });
  return out;
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP_OF_ACTIVATIONS(dilated_conv1d)
