// ik_llama.cpp behind four C functions: its structs differ from those of llama.cpp's Python
// bindings, and change. Repacking, fused experts and flash attention are on.
#include <llama.h>

namespace {

struct Peer {
  llama_model* model;
  llama_context* context;
  llama_batch batch;
};

}  // namespace

extern "C" {

void* peer_open(const char* path, int threads, int context, int sequences, int batch) {
  llama_backend_init();
  auto wanted = llama_model_default_params();
  wanted.use_mmap = false;
  wanted.repack_tensors = true;
  wanted.n_seq_max = sequences;
  wanted.flash_attn = true;
  auto* model = llama_model_load_from_file(path, wanted);
  if (model == nullptr) return nullptr;
  auto params = llama_context_default_params();
  params.n_ctx = context;
  params.n_batch = params.n_ubatch = batch;
  params.n_seq_max = sequences;
  params.n_threads = params.n_threads_batch = threads;
  params.flash_attn = true;
  params.fused_moe_up_gate = true;
  params.graph_reuse = true;
  auto* made = llama_init_from_model(model, params);
  if (made == nullptr) return nullptr;
  return new Peer{model, made, llama_batch_init(batch, 0, sequences)};
}

int peer_decode(void* handle, int n, const int* tokens, const int* positions, const int* sequences,
                const signed char* wanted) {
  auto& [model, context, batch] = *static_cast<Peer*>(handle);
  batch.n_tokens = n;
  for (int i = 0; i < n; ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = positions[i];
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequences[i];
    batch.logits[i] = wanted[i];
  }
  return llama_decode(context, batch);
}

const float* peer_logits(void* handle, int i) {
  return llama_get_logits_ith(static_cast<Peer*>(handle)->context, i);
}

void peer_forget(void* handle) { llama_kv_cache_clear(static_cast<Peer*>(handle)->context); }

}  // extern "C"
