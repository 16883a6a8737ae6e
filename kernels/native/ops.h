// The operators of one instruction set, and the table they fill.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

using torch::stable::Tensor;

namespace Q3N_LEVEL {

Tensor causal_conv1d(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor conv_, Tensor span,
                     Tensor query_start_loc, Tensor slot, Tensor context_len);
Tensor gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log,
                        Tensor dt_bias, Tensor state_, Tensor key_, Tensor u_, Tensor g_,
                        Tensor span_, Tensor query_start_loc, Tensor slot, Tensor context_len);
Tensor rms_norm(Tensor x, Tensor weight, double eps, std::optional<Tensor> residual_);
Tensor rms_norm_gated(Tensor x, Tensor z, Tensor weight, double eps);
std::tuple<Tensor, Tensor> qk_norm_rope(Tensor qkv, Tensor q_weight, Tensor k_weight,
                                        Tensor cos_sin, Tensor positions, int64_t num_heads,
                                        int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim,
                                        double eps);
void output_gate(Tensor x_, Tensor gate);
std::tuple<Tensor, Tensor> router(Tensor logits, int64_t k, bool renormalise);
Tensor fused_moe(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids);
void shared_expert_gate(Tensor x, Tensor weight, Tensor shared_, std::optional<Tensor> routed);
std::tuple<Tensor, Tensor> draft_head(Tensor x, Tensor weight, Tensor scale, Tensor rows);
Tensor paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor token_table,
                       Tensor table_row, Tensor query_start_loc, Tensor seq_lens, double scale,
                       std::optional<Tensor> tree_mask);

}  // namespace Q3N_LEVEL

using Boxed = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

constexpr int kOps = 11;

// In the order of kOpNames (ops.cpp).
struct Level {
  const char* name;
  Boxed ops[kOps];
};
