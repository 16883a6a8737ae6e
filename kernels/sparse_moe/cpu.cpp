#include "ops.h"
#include "parts.h"

namespace Q3N_LEVEL {
namespace {

Tensor sparse_moe(Tensor x, std::optional<Tensor> norm, double eps, std::optional<Tensor> residual_,
                  Tensor router_packed, Tensor router_scale, std::optional<Tensor> router_zero,
                  int64_t router_encoding, int64_t router_group, int64_t top_k, bool renormalise,
                  Tensor packed13, Tensor scale13, std::optional<Tensor> zero13, int64_t encoding13,
                  int64_t group13, Tensor packed2, Tensor scale2, std::optional<Tensor> zero2,
                  int64_t encoding2, int64_t group2, int64_t I, std::optional<Tensor> gate,
                  std::optional<Tensor> shared13, std::optional<Tensor> shared_scale13,
                  std::optional<Tensor> shared_zero13, int64_t shared_encoding13,
                  int64_t shared_group13, std::optional<Tensor> shared2,
                  std::optional<Tensor> shared_scale2, std::optional<Tensor> shared_zero2,
                  int64_t shared_encoding2, int64_t shared_group2, int64_t shared_I) {
  const Tensor in = norm ? rms_norm(x, *norm, eps, residual_) : x;
  const Tensor logits = linear(in, router_packed, router_scale, router_zero, router_encoding,
                               router_group, packed13.size(0), false);
  const auto [weights, experts] = router(logits, top_k, renormalise);
  return fused_moe_packed(in, packed13, scale13, zero13, encoding13, group13, packed2, scale2,
                          zero2, encoding2, group2, I, weights, experts, gate, shared13,
                          shared_scale13, shared_zero13, shared_encoding13, shared_group13, shared2,
                          shared_scale2, shared_zero2, shared_encoding2, shared_group2, shared_I);
}

}  // namespace
}  // namespace Q3N_LEVEL

Q3N_OP(sparse_moe)
