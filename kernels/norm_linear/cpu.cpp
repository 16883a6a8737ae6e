#include "ops.h"
#include "parts.h"

namespace Q3N_LEVEL {
namespace {

// The second product is empty without a second weight.
std::tuple<Tensor, Tensor> norm_linear(Tensor x, Tensor norm, double eps,
                                       std::optional<Tensor> residual_, Tensor packed, Tensor scale,
                                       std::optional<Tensor> zero, int64_t encoding, int64_t group,
                                       int64_t N, std::optional<Tensor> packed2,
                                       std::optional<Tensor> scale2, std::optional<Tensor> zero2,
                                       int64_t encoding2, int64_t group2, int64_t N2) {
  const Tensor in = rms_norm(x, norm, eps, residual_);
  Tensor first = linear(in, packed, scale, zero, encoding, group, N, false);
  if (!packed2) return {first, empty_as(x, {0, N2})};
  return {first, linear(in, *packed2, *scale2, zero2, encoding2, group2, N2, false)};
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(norm_linear)
