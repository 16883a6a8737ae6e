// Registers the operators with torch and chooses the instruction set that runs them.
#include "ops.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "step.h"

namespace baseline {
extern const Level level;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
namespace avx512bf16 {
extern const Level level;
}
#endif

namespace {

constexpr const char* kOpNames[kOps] = {"causal_conv1d",  "gated_delta_rule",  "rms_norm",
                                        "rms_norm_gated", "qk_norm_rope",      "output_gate",
                                        "draft_head",     "fused_moe",         "paged_attention",
                                        "router",         "shared_expert_gate"};

// What this processor can run, lowest first.
std::vector<const Level*> available() {
  std::vector<const Level*> levels{&baseline::level};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    levels.push_back(&avx2::level);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      levels.push_back(&avx512::level);
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        levels.push_back(&avx512bf16::level);
    }
  }
#endif
  return levels;
}

std::atomic<const Level*> active{available().back()};

int64_t grid() { return baseline::kGrid; }

std::string isa() { return active.load()->name; }

// Comma-separated, lowest first.
std::string isa_levels() {
  std::string names;
  for (const Level* level : available())
    names += (names.empty() ? "" : ",") + std::string(level->name);
  return names;
}

void set_isa(std::string name) {
  for (const Level* level : available()) {
    if (name == level->name) {
      active = level;
      return;
    }
  }
  throw std::runtime_error("instruction set " + name +
                           " is not available here; available: " + isa_levels());
}

template <int kOp>
void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  active.load(std::memory_order_relaxed)->ops[kOp](stack, inputs, outputs);
}

template <int... kOp>
void implement_all(torch::stable::detail::StableLibrary& m, std::integer_sequence<int, kOp...>) {
  (m.impl(kOpNames[kOp], &call<kOp>), ...);
}

}  // namespace

STABLE_TORCH_LIBRARY(qwen3next, m) {
  m.def("grid() -> int");
  m.def("isa() -> str");
  m.def("isa_levels() -> str");
  m.def("set_isa(str name) -> ()");
  m.def(
      "causal_conv1d(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor(a!) conv_, Tensor span, "
      "Tensor query_start_loc, Tensor slot, Tensor context_len) -> Tensor");
  m.def(
      "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log, "
      "Tensor dt_bias, Tensor(a!) state_, Tensor(b!) key_, Tensor(c!) u_, Tensor(d!) g_, "
      "Tensor(e!) span_, Tensor query_start_loc, Tensor slot, Tensor context_len) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual_) -> Tensor");
  m.def("rms_norm_gated(Tensor x, Tensor z, Tensor weight, float eps) -> Tensor");
  m.def(
      "qk_norm_rope(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos_sin, "
      "Tensor positions, int num_heads, int num_kv_heads, int head_dim, int rotary_dim, "
      "float eps) -> (Tensor, Tensor)");
  m.def("output_gate(Tensor(a!) x_, Tensor gate) -> ()");
  m.def("router(Tensor logits, int k, bool renormalise) -> (Tensor, Tensor)");
  m.def(
      "fused_moe(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids) -> Tensor");
  m.def("shared_expert_gate(Tensor x, Tensor weight, Tensor(a!) shared_, Tensor? routed) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor token_table, "
      "Tensor table_row, Tensor query_start_loc, Tensor seq_lens, float scale, "
      "Tensor? tree_mask) -> Tensor");
  m.def("draft_head(Tensor x, Tensor weight, Tensor scale, Tensor rows) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qwen3next, CompositeExplicitAutograd, m) {
  m.impl("grid", TORCH_BOX(&grid));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isa_levels", TORCH_BOX(&isa_levels));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}

STABLE_TORCH_LIBRARY_IMPL(qwen3next, CPU, m) {
  implement_all(m, std::make_integer_sequence<int, kOps>{});
}
