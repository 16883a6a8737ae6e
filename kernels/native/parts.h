// Ops that other ops call as parts of theirs.
#pragma once

#include <optional>
#include <tuple>

#include "tensor.h"

namespace Q3N_LEVEL {

Tensor causal_conv1d(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor conv_, Tensor span,
                     Tensor query_start_loc, Tensor slot, Tensor context_len);

Tensor fused_moe_packed(Tensor x, Tensor packed13, Tensor scale13, std::optional<Tensor> zero13,
                        int64_t encoding13, int64_t group13, Tensor packed2, Tensor scale2,
                        std::optional<Tensor> zero2, int64_t encoding2, int64_t group2, int64_t I,
                        Tensor topk_weights, Tensor topk_ids, std::optional<Tensor> gate,
                        std::optional<Tensor> shared13, std::optional<Tensor> shared_scale13,
                        std::optional<Tensor> shared_zero13, int64_t shared_encoding13,
                        int64_t shared_group13, std::optional<Tensor> shared2,
                        std::optional<Tensor> shared_scale2, std::optional<Tensor> shared_zero2,
                        int64_t shared_encoding2, int64_t shared_group2, int64_t shared_I);

Tensor gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log,
                        Tensor dt_bias, Tensor state_, Tensor key_, Tensor u_, Tensor g_,
                        Tensor span_, Tensor query_start_loc, Tensor slot, Tensor context_len);

Tensor linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, int64_t encoding,
              int64_t group, int64_t N, bool fp32);

Tensor rms_norm(Tensor x, Tensor weight, double eps, std::optional<Tensor> residual_);

// `rms_norm_gated` into a given tensor.
void rms_norm_gated_to(Tensor out, Tensor x, Tensor z, Tensor weight, double eps,
                       bool sigmoid_gate);

std::tuple<Tensor, Tensor> router(Tensor logits, int64_t k, bool renormalise);

}  // namespace Q3N_LEVEL
