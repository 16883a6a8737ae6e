"""The host still has every symbol and signature the plugin leans on; read, not imported."""

import ast
import inspect
from itertools import chain

import pytest

from engines.contract import (
    ENGINES,
    Sources,
    arguments,
    changes,
    check_entry,
    check_modules,
    definition,
    host,
    imported,
    in_order,
    kept,
    keywords,
    other_hosts,
    pairs,
)
from engines.patch_lists import check_generated
from qwen3next_plugin.engines.sglang.speculation.verify import OF_LOGITS, OF_REQUEST, SUMS
from qwen3next_plugin.model.moe import route

HOST = "sglang"
CHANGES = changes(HOST)

# What our code implements for the host: class → the methods whose arguments must stay.
OVERRIDDEN = {
    "srt/layers/attention/base_attn_backend.py": {
        "AttentionBackend": {
            "init_forward_metadata": ["self", "forward_batch"],
            "init_forward_metadata_out_graph": ["self", "forward_batch", "in_capture"],
            "init_cuda_graph_state": ["self", "max_bs", "max_num_tokens"],
            "update_verify_buffers_to_fill_after_draft": ["self", "spec_info", "cuda_graph_bs"],
        },
    },
    "srt/layers/attention/intel_amx_backend.py": {
        "IntelAMXAttnBackend": {
            "init_forward_metadata": ["self", "forward_batch"],
            "forward_extend": ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"],
            "forward_decode": ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"],
        },
    },
    "srt/layers/attention/hybrid_linear_attn_backend.py": {
        "HybridLinearAttnBackend": {
            "__init__": ["self", "full_attn_backend", "linear_attn_backend", "full_attn_layers"],
            "update_mamba_state_after_mtp_verify": [
                *("self", "last_correct_step_indices", "mamba_track_indices"),
                "mamba_steps_to_track",
            ],
        },
        "MambaAttnBackendBase": {"supports_prefill_graph_extend": ["self"]},
    },
    "srt/layers/logits_processor.py": {
        "LogitsProcessor": {
            "forward": [
                *("self", "input_ids", "hidden_states", "lm_head", "logits_metadata"),
                "hidden_states_before_norm",
            ],
        },
    },
    "srt/mem_cache/memory_pool.py": {
        "MambaPool": {
            "clear_slots": ["self", "indices"],
            "copy_from": ["self", "src_indices", "dst_indices"],
            "get_cpu_copy": ["self", "indices"],
        },
    },
    "srt/mem_cache/unified_cache/unified_cache_linker.py": {
        "UnifiedCacheLinker": {
            "lookup": ["self", "rid", "transfers"],
            "load": ["self", "rid", "transfers"],
            "start_layer_wise_loading": ["self"],
            "finish_layer_wise_loading": ["self", "counter_index"],
            "cancel_queued_load": ["self", "rid"],
            "offload": ["self", "transfers", "session_id"],
            "num_completed_offloads": ["self"],
            "pop_completed_offload": ["self"],
            "reset": ["self"],
            "close": ["self"],
        },
    },
    "srt/layers/quantization/base_config.py": {
        "QuantizationConfig": {
            "get_quant_method": ["self", "layer", "prefix"],
            "from_config": ["cls", "config"],
            "get_name": ["self"],
            "get_supported_act_dtypes": ["self"],
            "get_min_capability": ["cls"],
            "get_config_filenames": [],
            "get_scaled_act_names": ["self"],
        },
        "LinearMethodBase": {
            "create_weights": [
                *("self", "layer", "input_size_per_partition", "output_partition_sizes"),
                *("input_size", "output_size", "params_dtype"),
            ],
            "apply": ["self", "layer", "x", "bias"],
        },
        "FusedMoEMethodBase": {
            "create_weights": [
                *("self", "layer", "num_experts", "hidden_size"),
                *("intermediate_size_per_partition", "params_dtype"),
            ],
            "create_moe_runner": ["self", "layer", "moe_runner_config"],
            "apply": ["self", "layer", "dispatch_output"],
        },
    },
    "srt/layers/quantization/unquant.py": {
        "UnquantizedFusedMoEMethod": {"forward_cpu": ["self", "layer", "dispatch_output"]},
    },
    "srt/platforms/interface.py": {
        "SRTPlatform": {"apply_server_args_defaults": ["self", "server_args"]},
    },
    "srt/lora/lora_manager.py": {
        "LoRAManager": {
            "init_state": ["self", "max_lora_rank", "target_modules", "lora_paths"],
            "load_lora_weights": ["self", "lora_ref"],
            "load_lora_weights_from_tensors": ["self", "lora_ref", "tensors"],
            "fetch_new_loras": ["self", "new_loras"],
            "prepare_lora_batch": ["self", "forward_batch"],
            "reset_lora_batch": ["self"],
        },
    },
    "srt/lora/mem_pool.py": {
        "LoRAMemoryPool": {"can_support": ["self", "config"], "remove_lora": ["self", "uid"]},
    },
    "srt/speculative/eagle_worker_v2.py": {
        "EAGLEWorkerV2": {
            "init_cuda_graphs": ["self"],
            "forward_batch_generation": [
                *("self", "batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
            ],
            "verify": ["self", "batch", "grammar_barrier"],
        },
    },
}
# What our code calls, with the arguments it passes by name or counts on by position.
CALLED = {
    "srt/arg_groups/overrides.py": {
        "declare_resolution": ["server_args", "source"],
        "record_foreign_defaults": ["server_args", "source", "resolve"],
    },
    "srt/arg_groups/model_override_base.py": {
        "model_config_of": ["server_args"],
        "resolving_view": ["server_args"],
    },
    "srt/managers/scheduler_components/batch_result_processor.py": {
        "advance_grammar_fsm": ["self", "result", "batch"],
    },
    "srt/plugins/hook_registry.py": {
        "register": ["cls", "target", "hook", "hook_type"],
        "apply_hooks": ["cls"],
    },
    "srt/layers/moe/topk.py": {
        "bind_runner_backend": ["self", "runner_backend", "routing_method_type"],
        "build_precomputed_topk_output": ["topk_weights", "topk_ids", "topk_config", "layer_id"],
    },
    "srt/layers/moe/fused_moe_triton/layer.py": {"run_moe_core": ["self", "dispatch_output"]},
    "srt/model_executor/runner_backend_utils/breakable_cuda_graph/breakable_cuda_graph.py": {
        "eager_on_graph": ["fn", "capture_stub"],
    },
    "srt/layers/attention/attention_registry.py": {"register_attention_backend": ["name"]},
    "srt/layers/attention/intel_amx_backend.py": {
        "_build_extend_metadata": ["self", "forward_batch"],
    },
    "srt/configs/mamba_utils.py": {"mamba2_state_dtype": ["config"]},
    "srt/lora/utils.py": {"generate_sequence_lengths": ["forward_batch", "device"]},
    "srt/layers/sampler.py": {
        "apply_custom_logit_processor": ["logits", "sampling_batch_info"],
    },
    "srt/sampling/custom_logit_processor.py": {"from_str": ["cls", "json_str"]},
    "srt/sampling/penaltylib/orchestrator.py": {
        "cumulate_output_tokens": ["self", "output_ids"],
        "filter": ["self", "keep_indices"],
    },
    "srt/configs/model_config.py": {"_get_and_verify_dtype": ["config", "dtype"]},
    "srt/mem_cache/unified_radix_cache.py": {"path_device_indices": ["self", "node"]},
    "srt/mem_cache/unified_cache/unified_tree_core_interface.py": {
        "collect_path_info": ["self", "end_node_ids"],
        "get_component_device_value": ["self", "node_id", "component_type"],
        "get_hash_values": ["self", "node_id"],
        "get_prefix_hash_values": ["self", "node_id"],
    },
    "srt/disaggregation/common/conn.py": {
        "record_failure": ["self", "bootstrap_room", "failure_reason"],
        "update_status": ["self", "bootstrap_room", "status"],
    },
    "srt/disaggregation/utils.py": {"prepare_abort": ["req", "error_message", "status_code"]},
    "srt/managers/schedule_batch.py": {"set_finish_with_abort": ["self", "error_msg"]},
    "srt/session/session_controller.py": {"abort_req": ["self"]},
    "srt/managers/tp_worker.py": {"deserialize_own_rank": ["self", "serialized_named_tensors"]},
    "srt/managers/scheduler_components/weight_updater.py": {
        "_select_runners": ["self", "selector"],
        "flush_cache_after_weight_update": ["self", "recv_req", "success", "message"],
        "record_weight_version_after_update": ["self", "weight_version"],
    },
    "srt/model_executor/model_runner_components/weight_updater.py": {
        "receive_weights_from_distributed": [
            *("self", "names", "dtypes", "shapes", "group_name", "load_format"),
        ],
    },
}
# Constructors of layers, and of a manager: arguments passed by name.
BUILT = {
    "srt/lora/lora_manager.py": {
        "LoRAManager": [
            *("base_model", "base_hf_config", "max_loras_per_batch", "load_config", "dtype"),
            *("server_args", "lora_backend", "max_lora_rank", "target_modules", "lora_paths"),
        ],
    },
    "srt/layers/linear.py": {
        "ReplicatedLinear": ["bias", "quant_config", "prefix"],
        "ColumnParallelLinear": ["bias", "quant_config", "prefix"],
        "MergedColumnParallelLinear": ["bias", "quant_config", "prefix"],
        "QKVParallelLinear": ["bias", "quant_config", "prefix"],
        "RowParallelLinear": ["bias", "quant_config", "prefix"],
    },
    "srt/layers/moe/fused_moe_triton/layer.py": {
        "FusedMoE": [
            *("num_experts", "hidden_size", "intermediate_size", "layer_id", "top_k"),
            *("quant_config", "quant_method", "routing_method_type", "inplace", "prefix"),
        ],
    },
    "srt/layers/moe/topk.py": {"TopK": ["layer_id", "renormalize", "custom_routing_function"]},
    "srt/layers/radix_attention.py": {
        "RadixAttention": ["num_kv_heads", "layer_id", "quant_config", "prefix"],
    },
}
# What the host passes by name to our replacement of a class of its own.
PASSED = {
    "srt/mem_cache/memory_pool.py": {
        "mamba_pool_cls": [
            *("size", "spec_state_size", "cache_params", "mamba_layer_ids", "device"),
            "speculative_eagle_topk",
        ],
    },
    "srt/mem_cache/unified_cache/linker_factory.py": {
        "linker_cls": ["components", "extra_config", "forward_stream"],
    },
}
# Fields our code reads.
FIELDS = {
    "srt/disaggregation/common/conn.py": {"PrefillServerInfo": ["kv_layout"]},
    "srt/managers/io_struct.py": {
        "BeginWeightUpdateReqInput": ["selector"],
        "GenerateReqInput": ["contains_mm_input", "input_embeds", "positional_embed_overrides"],
        "UpdateWeightsFromTensorReqInput": [
            *("serialized_named_tensors", "load_format", "flush_cache", "torch_empty_cache"),
            *("weight_version", "selector"),
        ],
        "UpdateWeightsFromDistributedReqInput": [
            *("names", "dtypes", "shapes", "group_name", "load_format", "flush_cache"),
            *("torch_empty_cache", "weight_version", "selector"),
        ],
    },
    "srt/mem_cache/cache_init_params.py": {
        "CacheInitParams": [
            *("req_to_token_pool", "token_to_kv_pool_allocator", "mtp_draft_device_pools"),
            "sidecar_draft_device_pools",
        ],
    },
    "srt/mem_cache/hicache_storage.py": {"PoolTransfer": ["name", "device_indices", "keys"]},
    "srt/mem_cache/unified_cache/unified_tree_core_interface.py": {
        "TreePathNodeInfo": ["node_id", "path_end"],
    },
    "srt/mem_cache/kv_cache_configurator.py": {"KVCacheConfigurator": ["model_config"]},
    "srt/speculative/eagle_info.py": {
        "EagleDraftInput": ["hidden_states"],
        "EagleVerifyInput": [
            *("draft_token_num", "prepared_out_cache_loc", "prepared_mrope_positions"),
        ],
    },
    "srt/managers/schedule_batch.py": {
        "ScheduleBatch": [
            *("device", "reqs", "sampling_info", "spec_algorithm", "has_grammar", "prefix_lens"),
            *("extend_lens", "input_embeds", "replace_embeds", "replace_positions"),
            "model_config",
        ],
    },
    "srt/sampling/sampling_batch_info.py": {
        "SamplingBatchInfo": [
            *("top_ks", "top_ps", "min_ps", "need_top_k_sampling", "need_top_p_sampling"),
            *("need_min_p_sampling", "has_custom_logit_processor", "penalizer_orchestrator"),
            *("temperatures", "custom_params", "custom_logit_processor", "grammar_mask"),
        ],
        "ProcessorEntry": ["processor", "rows", "indices"],
    },
    "srt/sampling/sampling_params.py": {
        "SamplingParams": [
            *("min_new_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty"),
            *("stop_strs", "stop_regex_strs"),
        ],
    },
    "srt/model_executor/cuda_graph_config.py": {
        "CudaGraphConfig": ["decode", "prefill"],
        "PhaseConfig": ["backend"],
    },
    "srt/model_executor/forward_batch_info.py": {
        "ForwardBatch": [
            *("forward_mode", "batch_size", "seq_lens", "extend_seq_lens", "spec_info"),
            *("req_pool_indices", "rids", "positions", "out_cache_loc"),
            *("extend_seq_lens_cpu", "extend_prefix_lens_cpu"),
            *("mamba_track_mask", "mamba_track_indices"),
            *("mamba_prefill_track_mask_cpu", "mamba_track_seqlens_cpu", "lora_ids"),
        ],
    },
}
# What a host's class keeps on itself, and ours reads.
KEPT = {
    "srt/mem_cache/unified_cache/unified_cache_linker.py": {
        "UnifiedCacheLinkerWrapper": ["hit_markers", "cache_linker"],
    },
    "srt/disaggregation/common/conn.py": {
        "CommonKVManager": ["kv_layout", "prefill_info_table"],
        "CommonKVReceiver": ["kv_mgr", "bootstrap_addr", "bootstrap_room", "conclude_state"],
    },
    "srt/disaggregation/prefill.py": {"PrefillBootstrapQueue": ["scheduler", "queue"]},
    "srt/disaggregation/decode.py": {
        "DecodePreallocQueue": ["scheduler", "queue", "retracted_queue"],
        "DecodeTransferQueue": ["queue"],
    },
    "srt/lora/lora_config.py": {"LoRAConfig": ["hf_config", "r"]},
    "srt/lora/lora_manager.py": {"LoRAManager": ["configs", "loras", "max_loras_per_batch"]},
    "srt/layers/attention/hybrid_linear_attn_backend.py": {
        "HybridLinearAttnBackend": ["linear_attn_backend"],
    },
    "srt/layers/logits_processor.py": {"LogitsProcessor": ["use_fp32_lm_head"]},
    "srt/layers/radix_attention.py": {
        "RadixAttention": [
            *("tp_q_head_num", "tp_k_head_num", "qk_head_dim", "scaling", "layer_id"),
        ],
    },
    "srt/configs/model_config.py": {
        "ModelConfig": [
            *("hf_config", "hf_text_config", "is_draft_model", "head_dim", "v_head_dim"),
            "is_multimodal",
        ],
    },
    "srt/configs/qwen4_exp.py": {
        "Qwen4ExpTextConfig": ["rope_parameters", "rope_scaling", "layer_types", "ple_layer_ids"],
    },
    "srt/managers/schedule_batch.py": {
        "Req": [
            *("origin_input_ids", "output_ids", "retraction_count", "return_hidden_states"),
            *("sampling_params", "bootstrap_host", "bootstrap_room", "rid", "finished_len"),
            *("input_embeds", "session", "to_finish", "finished_reason", "grammar", "prefix_len"),
        ],
    },
    "srt/managers/tokenizer_manager.py": {"TokenizerManager": ["rid_to_state", "is_pause"]},
    "srt/managers/scheduler.py": {
        "Scheduler": [
            *("chunked_req", "waiting_queue", "grammar_manager", "disaggregation_mode"),
            *("disagg_prefill_bootstrap_queue", "disagg_prefill_inflight_queue"),
            *("disagg_decode_prealloc_queue", "disagg_decode_transfer_queue"),
        ],
    },
    "srt/session/session_controller.py": {"Session": ["req_nodes", "streaming"]},
    "srt/constrained/grammar_manager.py": {"GrammarManager": ["grammar_queue"]},
    "srt/mem_cache/memory_pool.py": {"HybridReqToTokenPool": ["mamba_pool"]},
    "srt/sampling/penaltylib/orchestrator.py": {"BatchedPenalizerOrchestrator": ["penalizers"]},
    "srt/speculative/eagle_worker_v2.py": {
        "EAGLEWorkerV2": [
            *("speculative_algorithm", "speculative_num_steps", "speculative_num_draft_tokens"),
        ],
        "EagleDraftWorker": ["draft_runner"],
    },
}


UPDATES = [
    "update_weights_from_disk",
    "load_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
]


@pytest.fixture(scope="module", params=["installed", *other_hosts(HOST)])
def sources(request) -> Sources:
    return host(HOST, request.param)


def test_other_hosts_are_read_too():
    assert all(host(HOST, name).has("__init__.py") for name in other_hosts(HOST))


def test_lists_of_patches_are_up_to_date():
    assert len(CHANGES) > 50
    check_modules(HOST)
    check_generated(HOST)


@pytest.mark.parametrize("entry", CHANGES, ids=lambda entry: entry.target)
def test_patches_fit(sources, entry):
    check_entry(sources, entry)


@pytest.mark.parametrize(("module", "symbol"), imported(HOST), ids=lambda part: part)
def test_imported_symbol_is_there(sources, module, symbol):
    sources.check_import(module, symbol)


@pytest.mark.parametrize(("path", "name"), pairs(OVERRIDDEN))
def test_overridden_methods_keep_their_arguments(sources, path, name):
    owner = definition(sources.tree(path), name)
    for method, wanted in OVERRIDDEN[path][name].items():
        found = arguments(definition(owner, method))
        assert in_order(wanted, found), f"{name}.{method}{found} lacks {wanted}"


@pytest.mark.parametrize(("path", "name"), pairs(CALLED))
def test_called_functions_keep_their_arguments(sources, path, name):
    found = arguments(definition(sources.tree(path), name))
    assert in_order(CALLED[path][name], found), f"{name}{found} lacks {CALLED[path][name]}"


@pytest.mark.parametrize(("path", "name"), pairs(BUILT))
def test_layers_are_built_as_they_were(sources, path, name):
    owner = definition(sources.tree(path), name)
    assert set(BUILT[path][name]) <= set(arguments(definition(owner, "__init__")))


@pytest.mark.parametrize(("path", "name"), pairs(PASSED))
def test_stand_ins_are_given_what_they_take(sources, path, name):
    calls = keywords(sources.tree(path), name)
    assert calls
    assert all(set(PASSED[path][name]) <= given for given in calls)


def test_a_routing_function_is_given_what_ours_takes(sources):
    calls = keywords(sources.tree("srt/layers/moe/topk.py"), "custom_routing_function")
    assert calls == [set(inspect.signature(route).parameters)]


@pytest.mark.parametrize(("path", "name"), pairs(FIELDS))
def test_fields_are_there(sources, path, name):
    owner = definition(sources.tree(path), name)
    for field in FIELDS[path][name]:
        definition(owner, field)


@pytest.mark.parametrize(("path", "name"), pairs(KEPT))
def test_attributes_are_kept(sources, path, name):
    assert set(KEPT[path][name]) <= kept(definition(sources.tree(path), name))


def flags() -> set[str]:
    """The flags that our tables name: what is refused, filled in, and asked of memory."""
    from qwen3next_plugin.engines.sglang import served
    from qwen3next_plugin.engines.sglang.cpu import memory
    from qwen3next_plugin.engines.sglang.flags import CPU_DEFAULTS

    kinds = ("SERVED", "OF_EXTRAS")
    tables = [getattr(served, name) for name in vars(served) if name.startswith(kinds)]
    return {*chain.from_iterable(tables), *CPU_DEFAULTS, *memory.GIVEN}


@pytest.mark.parametrize("name", sorted(flags()))
def test_flags_are_the_hosts(sources, name):
    assert name in sources.names("srt/arg_groups/field_order.py")


def test_platforms_are_given_the_raw_flags_too(sources):
    assert "_raw_input" in ast.unparse(sources.tree("srt/arg_groups/pipeline.py"))


def test_a_graphs_batch_says_how_many_rows_fill_it(sources):
    """And where it is captured, its pages to keep are in tensors that stay."""
    runner = sources.tree("srt/model_executor/runner/decode_cuda_graph_runner.py")
    view = ast.unparse(definition(runner, "build_replay_fb_view"))
    assert "num_padding=bs - raw_bs" in view
    owner = definition(runner, "DecodeCudaGraphRunner")
    assert "_slot('mamba_track_mask')" in ast.unparse(owner)
    assert "_slot('mamba_track_indices')" in ast.unparse(owner)


def test_prompts_graphs_begin_steps_as_batches_without_one_do(sources):
    """With the batch as the scheduler made it, whatever tensors the graph reads."""
    runner = sources.tree("srt/model_executor/runner/prefill_cuda_graph_runner.py")
    prepare = definition(runner, "_prepare_forward_metadata_for_replay")
    assert "attn_backend.init_forward_metadata(forward_batch)" in ast.unparse(prepare)


@pytest.mark.parametrize("file", ["trunk", "mtp"])
def test_prompts_graphs_run_the_body_of_either_model(sources, file):
    """With these three arguments; what a drafter is given besides lies in the batch."""
    runner = sources.tree("srt/model_executor/runner/prefill_cuda_graph_runner.py")
    call = "self.layer_model.forward(input_ids, positions, forward_batch, **kwargs)"
    assert call in ast.unparse(definition(runner, "_run_forward"))
    model = ast.parse((ENGINES / HOST / "model" / f"{file}.py").read_text(encoding="utf-8"))
    body = {"trunk": "Qwen3NextModel", "mtp": "Predictor"}[file]
    wanted = ["self", "input_ids", "positions", "forward_batch"]
    assert arguments(definition(definition(model, body), "forward"))[:4] == wanted


def test_kv_locations_are_as_wide_as_the_models_config_says(sources):
    """Which an indexer's keys widen, when the model is loaded and before pools are sized."""
    pools = sources.tree("srt/mem_cache/kv_cache_configurator.py")
    build = ast.unparse(definition(pools, "_build_hybrid_linear_kv_pool"))
    assert "head_dim=self.model_config.head_dim" in build
    sizes = definition(
        sources.tree("srt/model_executor/pool_configurator.py"), "_compute_cell_size"
    )
    assert "n * (model_config.head_dim + model_config.v_head_dim)" in ast.unparse(sizes)
    runner = ast.unparse(sources.tree("srt/model_executor/model_runner.py"))
    assert "self.model_config = adjust_config_with_unaligned_cpu_tp(" in runner


def test_embeddings_are_one_argument_of_a_model_that_has_embeddings(sources):
    runner = sources.tree("srt/model_executor/model_runner.py")
    build = ast.unparse(definition(runner, "_extend_forward_kwargs"))
    assert "kwargs['input_embeds'] = forward_batch.input_embeds.bfloat16()" in build
    assert "embed_layer = self.model.get_input_embeddings()" in build
    assert "kwargs['input_embeds'][forward_batch.replace_positions] =" in build


def test_attention_takes_an_index_to_the_backend(sources):
    """SGLang passes on what it does not know."""
    layer = sources.tree("srt/layers/radix_attention.py")
    forward = ast.unparse(definition(definition(layer, "RadixAttention"), "forward"))
    passed = "forward_batch, save_kv_cache, **kwargs)"
    assert f"get_attn_backend().forward(q, k, v, self, {passed}" in forward
    hybrid = sources.tree("srt/layers/attention/hybrid_linear_attn_backend.py")
    backend = definition(hybrid, "HybridLinearAttnBackend")
    for name in ("forward_decode", "forward_extend"):
        assert f"(q, k, v, layer, {passed}" in ast.unparse(definition(backend, name))


def test_a_verification_spreads_every_parameter_that_sampling_has_for_a_request(sources):
    """Watermarks are refused with drafts; masks of tokens are not offered with drafts."""
    info = definition(sources.tree("srt/sampling/sampling_batch_info.py"), "SamplingBatchInfo")
    fields = [node for node in info.body if isinstance(node, ast.AnnAssign)]
    tensors = {node.target.id for node in fields if "Tensor" in ast.unparse(node.annotation)}
    left_out = ("watermark_", "sampling_mask_", "sampling_support_", "rids_", "bootstrap_room_")
    found = {name for name in tensors if not name.startswith(left_out)}
    assert found == {*OF_LOGITS, *SUMS, *OF_REQUEST}


def test_a_grammars_mask_is_there_when_logits_change_last(sources):
    """In plain steps too, with and without an observer; it is dropped behind that."""
    info = definition(sources.tree("srt/sampling/sampling_batch_info.py"), "SamplingBatchInfo")
    for name in ("apply_logits_bias", "apply_logits_bias_with_observer"):
        text = ast.unparse(definition(info, name))
        last = text.index("self._apply_post_grammar_logits_transforms(logits)")
        assert text.index("self.grammar_mask.apply(logits)") < last
    runner = definition(sources.tree("srt/model_executor/model_runner.py"), "_preprocess_logits")
    text = ast.unparse(runner)
    dropped = text.index("sampling_info.grammar_mask = None")
    assert text.index("sampling_info.apply_logits_bias(") < dropped


def test_nixls_agent_is_looked_up_when_it_is_made(sources):
    """And SGLang names the memory of KV and states VRAM: nothing else decides where it is."""
    tree = sources.tree("srt/disaggregation/nixl/conn.py")
    made = ast.unparse(definition(definition(tree, "NixlKVManager"), "__init__"))
    assert "from nixl._api import nixl_agent," in made
    assert "self.agent = nixl_agent(" in made
    queue = sources.tree("srt/disaggregation/decode.py")
    assert "= ['VRAM'] * len(draft_kv_data_ptrs)" in ast.unparse(queue)


def test_a_prefill_server_registers_and_is_known_by_its_layout(sources):
    tree = sources.tree("srt/disaggregation/common/conn.py")
    register = definition(definition(tree, "CommonKVManager"), "register_to_bootstrap")
    assert "'kv_layout': self.kv_layout" in ast.unparse(register)
    assert "kv_layout=self.kv_layout" in ast.unparse(definition(tree, "_handle_route_get"))
    compared = "info.kv_layout is not None and self.kv_layout is not None"
    assert compared in ast.unparse(definition(tree, "try_ensure_parallel_info"))


@pytest.mark.parametrize("queue", ["prefill.PrefillBootstrapQueue", "decode.DecodePreallocQueue"])
def test_a_queue_answers_a_request_that_was_aborted_before_it(sources, queue):
    file, name = queue.split(".")
    owner = definition(sources.tree(f"srt/disaggregation/{file}.py"), name)
    add = ast.unparse(definition(owner, "add"))
    answered = "self.scheduler.retire_unadmitted_request(req)"
    assert f"is_unadmitted_reject(req):\n        {answered}" in add


def test_memory_is_released_by_tags_of_a_scheduler_that_is_idle(sources):
    updater = sources.tree("srt/managers/scheduler_components/weight_updater.py")
    release = ast.unparse(definition(updater, "release_memory_occupation"))
    idle = "self.is_fully_idle(ignore_waiting=scheduler is not None and scheduler._engine_paused)"
    assert f"assert {idle}" in release
    resume = ast.unparse(definition(updater, "resume_memory_occupation"))
    assert "self.offload_tags.remove(tag)" in resume


def test_a_session_without_its_memory_reads_its_text_again(sources):
    """As after a turn that was aborted, of which no record is left."""
    session = sources.tree("srt/session/streaming_session.py")
    streaming = definition(session, "StreamingSession")
    aborted = ast.unparse(definition(streaming, "try_cache_finished_req"))
    assert "del self.slots[req.session.session_id]" in aborted
    released = ast.unparse(definition(streaming, "release_session"))
    assert "slot = self.slots.pop(session_id, None)" in released
    looked_up = ast.unparse(definition(streaming, "find_active_slot"))
    assert "if slot is None or not slot.kv.holds_kv:\n        return None" in looked_up
    turn = definition(sources.tree("srt/session/session_controller.py"), "Session")
    assert "self.last_active_time = time.monotonic()" in ast.unparse(definition(turn, "create_req"))


def test_requests_that_ignore_the_end_are_scheduled_apart_without_a_radix_cache(sources):
    """As long as they do when they are looked at; a chunk of theirs must begin them."""
    adder = definition(sources.tree("srt/managers/schedule_policy.py"), "PrefillAdder")
    asked = "if req.sampling_params.ignore_eos and getattr(self.tree_cache, 'disable', True):"
    assert asked in ast.unparse(definition(adder, "add_one_req"))
    apart = ast.unparse(definition(adder, "add_one_req_ignore_eos"))
    assert "assert req.prefix_len == 0" in apart


def test_aborts_look_for_names_in_known_places(sources):
    """In as many, of which `mm_receiver` and diffusion models are not served."""
    abort = definition(sources.tree("srt/managers/scheduler.py"), "abort_request")
    assert ast.unparse(abort).count(".startswith(recv_req.rid)") == 8


def test_updates_of_weights_ask_models_for_a_reason_against_them(sources):
    updater = "srt/model_executor/model_runner_components/weight_updater.py"
    assert "_derived_weight_cache_error" in sources.names(updater)
    owner = definition(sources.tree(updater), "WeightUpdater")
    for name in UPDATES:
        assert "_unsupported_derived_weight" in ast.unparse(definition(owner, name))


def test_entry_point_groups_are_read(sources):
    groups = sources.names("srt/plugins/__init__.py")
    assert {"sglang.srt.plugins", "sglang.srt.platforms"} <= groups


def test_architecture_names_are_the_hosts(sources):
    text = ast.unparse(sources.tree("srt/configs/model_config.py"))
    assert "Qwen3NextForCausalLM" in text
    assert "Qwen3NextForCausalLMMTP" in text
