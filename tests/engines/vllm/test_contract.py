"""The host still has every symbol and signature the plugin leans on; read, not imported."""

import ast
import inspect

import pytest
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from engines.contract import (
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
from qwen3next_plugin.engines.vllm.checking import after_hosts
from qwen3next_plugin.engines.vllm.names import MODELS, TRUNKS
from qwen3next_plugin.model.moe import route

HOST = "vllm"
CHANGES = changes(HOST)

# What our code implements for the host: class → the methods whose arguments must stay.
OVERRIDDEN = {
    "v1/attention/backend.py": {
        "AttentionMetadataBuilder": {
            "__init__": ["self", "kv_cache_spec", "layer_names", "vllm_config", "device"],
            "build": ["self", "common_prefix_len", "common_attn_metadata", "fast_build"],
            "get_cudagraph_support": ["cls", "vllm_config", "kv_cache_spec"],
        },
        "AttentionBackend": {
            "get_name": [],
            "get_builder_cls": [],
            "is_ssm": ["cls"],
            "supports_device_cpu_query_lens_mismatch": ["cls"],
        },
    },
    "v1/attention/backends/cpu_attn.py": {
        "CPUAttentionBackend": {"get_impl_cls": []},
        "CPUAttentionBackendImpl": {
            "do_kv_cache_update": [
                *("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
            ],
            "forward": [
                *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
                *("output_scale", "output_block_scale"),
            ],
        },
    },
    "model_executor/layers/mamba/abstract.py": {
        "MambaBase": {
            "get_state_shape": ["self"],
            "get_state_dtype": ["self"],
            "mamba_type": ["self"],
            "get_kv_cache_spec": ["self", "vllm_config"],
            "bind_kv_cache": ["self", "kv_cache"],
        },
    },
    "v1/kv_offload/base.py": {
        "OffloadingWorker": {
            "submit_store": ["self", "job_id", "src_spec", "dst_spec"],
            "submit_load": ["self", "job_id", "src_spec", "dst_spec"],
            "get_finished": ["self"],
            "wait": ["self", "job_ids"],
            "shutdown": ["self"],
        },
    },
    "v1/kv_offload/tiering/spec.py": {
        "TieringOffloadingSpec": {"__init__": ["self", "config"], "get_manager": ["self"]},
    },
    "v1/kv_offload/cpu/spec.py": {
        "CPUOffloadingSpec": {"get_worker": ["self", "kv_caches"]},
    },
    "v1/kv_offload/tiering/base.py": {
        "SecondaryTierManager": {
            "__init__": [
                *("self", "offloading_spec", "primary_kv_view", "tier_type"),
                "backpressure_detector",
            ],
            "lookup": ["self", "key", "req_context"],
            "submit_store": ["self", "job_metadata"],
            "submit_load": ["self", "job_metadata"],
            "get_finished_jobs": ["self"],
            "on_new_request": ["self", "req_context"],
            "on_request_finished": ["self", "req_context"],
            "on_schedule_end": ["self", "context"],
            "drain_jobs": ["self"],
            "shutdown": ["self"],
        },
    },
    "v1/kv_offload/tiering/async_lookup.py": {
        "AsyncLookupManager": {
            "__init__": ["self", "tier_type"],
            "batch_lookup": ["self", "keys", "req_context"],
        },
    },
    "v1/worker/gpu_worker.py": {
        "Worker": {
            "initialize_from_config": ["self", "kv_cache_config"],
            "reload_weights": ["self"],
            "execute_model": ["self", "scheduler_output"],
            "sample_tokens": ["self", "grammar_output"],
        },
    },
    "v1/worker/cpu_worker.py": {
        "CPUWorker": {
            "__init__": [
                *("self", "vllm_config", "local_rank", "rank", "distributed_init_method"),
                "is_driver_worker",
            ],
            "init_device": ["self"],
            "determine_available_memory": ["self"],
        }
    },
    "v1/executor/multiproc_executor.py": {
        "MultiprocExecutor": {
            "_init_executor": ["self"],
            "shutdown": ["self"],
            "execute_model": ["self", "scheduler_output", "non_block"],
            "sample_tokens": ["self", "grammar_output", "non_block"],
            "take_draft_token_ids": ["self"],
        },
    },
    "v1/spec_decode/llm_base_proposer.py": {
        "SpecDecodeBaseProposer": {
            "prepare_next_token_ids_padded": [
                "self",
                "sampled_token_ids",
                "requests",
                "gpu_input_batch",
                "discard_request_mask",
            ],
            "prepare_inputs_padded": [
                "self",
                "common_attn_metadata",
                "spec_decode_metadata",
                "valid_sampled_tokens_count",
            ],
        }
    },
    "model_executor/layers/fused_moe/routed_experts.py": {
        "RoutedExperts": {"_get_quant_method": ["self", "prefix", "quant_config", "moe_config"]},
    },
    "model_executor/layers/fused_moe/experts/cpu_moe.py": {
        "CPUUnquantizedExperts": {
            "process_weights_after_loading": ["self", "layer"],
            "apply": [
                "self",
                "output",
                "hidden_states",
                "w1",
                "w2",
                "topk_weights",
                "topk_ids",
                "activation",
            ],
        },
    },
    "model_executor/layers/quantization/base_config.py": {
        "QuantizationConfig": {
            "get_quant_method": ["self", "layer", "prefix"],
            "override_quantization_method": ["cls", "hf_quant_cfg", "user_quant", "hf_config"],
            "from_config": ["cls", "config"],
            "maybe_update_config": ["self", "model_name", "hf_config", "revision"],
            "get_name": ["self"],
            "get_supported_act_dtypes": ["self"],
            "get_min_capability": ["cls"],
            "get_config_filenames": [],
        },
    },
    "model_executor/layers/linear.py": {
        "LinearMethodBase": {
            "create_weights": [
                *("self", "layer", "input_size_per_partition", "output_partition_sizes"),
                *("input_size", "output_size", "params_dtype"),
            ],
            "apply": ["self", "layer", "x", "bias"],
        },
    },
    "model_executor/layers/fused_moe/fused_moe_method_base.py": {
        "FusedMoEMethodBase": {
            "create_weights": [
                *("self", "layer", "num_experts", "hidden_size"),
                *("intermediate_size_per_partition", "params_dtype"),
            ],
            "get_fused_moe_quant_config": ["self", "layer"],
            "apply": [
                *("self", "layer", "x", "topk_weights", "topk_ids"),
                *("shared_experts", "shared_experts_input"),
            ],
        },
    },
    "v1/core/sched/scheduler.py": {
        "Scheduler": {
            "__init__": ["self", "vllm_config"],
            "update_from_output": ["self", "scheduler_output", "model_runner_output"],
            "_handle_stopped_request": ["self", "request"],
        },
    },
    "sampling_params.py": {
        "SamplingParams": {"_validate_spec_decode": ["self", "speculative_config"]},
    },
    "v1/sample/rejection_sampler.py": {
        "RejectionSampler": {
            "forward": ["self", "metadata", "draft_probs", "logits", "sampling_metadata"],
        },
    },
    "v1/sample/thinking_budget_state.py": {
        "ThinkingBudgetStateHolder": {
            "has_tracked_requests": ["self"],
            "update_state": ["self", "output_token_ids", "spec_token_ids", "repeat_indices"],
            "apply_to_logits": ["self", "logits", "predict_bonus_token", "spec_token_ids"],
        },
    },
    "model_executor/models/config.py": {
        "VerifyAndUpdateConfig": {
            "verify_and_update_config": ["vllm_config"],
            "verify_and_update_model_config": ["model_config"],
        },
    },
    "model_executor/models/interfaces.py": {
        "IsHybrid": {
            "get_mamba_state_shape_from_config": ["cls", "vllm_config"],
            "get_mamba_state_copy_func": ["cls"],
        },
        "SupportsMultiModalEmbeddings": {
            "embed_input_ids": ["self", "input_ids", "multimodal_embeddings", "is_multimodal"],
        },
        "MixtureOfExperts": {
            "update_physical_experts_metadata": [
                "self",
                "num_physical_experts",
                "num_local_physical_experts",
            ],
        },
    },
    "v1/worker/gpu/model_states/mamba_hybrid.py": {
        "MambaHybridModelState": {
            "__init__": ["self", "vllm_config", "model", "encoder_cache", "device"],
            "postprocess_state": ["self", "idx_mapping", "num_sampled", "num_computed_tokens"],
        },
    },
}
# What our code calls, with the arguments it passes by name or counts on by position.
CALLED = {
    "v1/attention/backends/registry.py": {
        "register_backend": ["backend", "class_path", "is_mamba"],
    },
    "v1/attention/backends/utils.py": {
        "mamba_get_block_table_tensor": [
            "block_table",
            "seq_lens",
            "kv_cache_spec",
            "mamba_cache_mode",
        ],
    },
    "utils/torch_utils.py": {
        "direct_register_custom_op": ["op_name", "op_func", "mutates_args", "fake_impl"],
    },
    "triton_utils/dispatcher.py": {"register_kernels": []},
    "v1/sample/sampler.py": {"gather_logprobs": ["logprobs", "num_logprobs", "token_ids"]},
    "model_executor/layers/fused_moe/layer.py": {
        "FusedMoEFactory": [
            *("dp_size", "custom_routing_function", "is_sequence_parallel"),
            "routed_experts_cls",
        ],
    },
    "model_executor/models/utils.py": {
        "make_layers": ["num_hidden_layers", "layer_fn", "prefix"],
        "sequence_parallel_chunk": ["x"],
        "make_empty_intermediate_tensors_factory": ["keys", "hidden_size"],
    },
    "model_executor/model_loader/weight_utils.py": {"sharded_weight_loader": ["shard_axis"]},
    "plugins/__init__.py": {"load_general_plugins": []},
    "model_executor/layers/fusion/mm_input_norm.py": {"_load_norm_params": ["model_config"]},
    "platforms/interface.py": {"is_cuda_alike": ["self"]},
    "v1/executor/multiproc_executor.py": {
        "collective_rpc": [
            *("self", "method", "timeout", "args", "kwargs", "non_block", "unique_reply_rank"),
            "kv_output_aggregator",
        ],
    },
    "distributed/kv_transfer/kv_connector/utils.py": {
        "aggregate": ["self", "outputs", "output_rank"],
    },
    "v1/kv_offload/cpu/shared_offload_region.py": {
        "__init__": [
            *("self", "engine_id", "num_chunks", "rank", "kv_bytes_per_chunk", "cpu_page_size"),
        ],
        "create_next_worker_view": ["self", "tensor_page_size"],
        "cleanup": ["self"],
    },
    "distributed/nixl_utils.py": {"is_nixl_available": []},
    "config/kv_transfer.py": {
        "has_connector": ["self", "connector_name"],
        "get_from_extra_config": ["self", "key", "default"],
        "is_kv_producer": ["self"],
    },
    "v1/kv_offload/file_mapper.py": {"from_offloading_spec": ["cls", "root_dir"]},
    "v1/kv_offload/tiering/async_lookup.py": {
        "mark_miss": ["self", "keys"],
        "cleanup": ["self", "req_id"],
        "flush": ["self"],
        "shutdown": ["self"],
    },
    "v1/worker/mamba_utils.py": {
        "run_fused_precopy": [
            "self",
            "num_reqs",
            "state_idx_gpu",
            "src_col_gpu",
            "token_bias_gpu",
            "idx_mapping",
        ],
    },
    "v1/worker/gpu_input_batch.py": {"get_token_id": ["self", "idx"]},
    "v1/engine/core.py": {
        "is_scheduler_paused": ["self"],
        "reset_prefix_cache": ["self", "reset_running_requests", "reset_connector"],
        "reset_encoder_cache": ["self"],
    },
    "v1/sample/logits_processor/builtin.py": {
        "apply_with_spec_decode": ["self", "logits", "num_draft_tokens"],
    },
}
# Fields our code reads.
FIELDS = {
    "v1/attention/backend.py": {
        "CommonAttentionMetadata": [
            "query_start_loc",
            "seq_lens",
            "num_actual_tokens",
            "max_query_len",
            "block_table_tensor",
        ],
    },
    "v1/kv_cache_interface.py": {
        "MambaSpec": [
            "shapes",
            "dtypes",
            "mamba_type",
            "mamba_cache_mode",
            "num_speculative_blocks",
        ],
        "KVCacheGroupSpec": ["layer_names", "kv_cache_spec"],
    },
    "v1/worker/mamba_utils.py": {
        "MambaSpecDecodeGPUContext": ["block_size"],
        "MambaBuffers": ["preprocess"],
        "MambaCopyBuffers": ["mamba_spec"],
    },
    "v1/core/sched/output.py": {
        "SchedulerOutput": [
            *("has_structured_output_requests", "total_num_scheduled_tokens"),
            "scheduled_cached_reqs",
        ],
    },
    "multimodal/processing/inputs.py": {"ProcessorInputs": ["mm_uuid_items"]},
    "config/vllm.py": {
        "VllmConfig": [
            "cache_config",
            "instance_id",
            "load_config",
            "lora_config",
            "quant_config",
            "scheduler_config",
            "speculative_config",
            "use_v2_model_runner",
            "watermark_config",
        ],
    },
    "v1/outputs.py": {
        "LogprobsTensors": ["logprob_token_ids", "logprobs", "selected_token_ranks"],
    },
    "config/cache.py": {
        "CacheConfig": [
            *("cache_dtype", "kv_offloading_size"),
            "enable_prefix_caching",
            "mamba_block_size",
            "mamba_page_size_padded",
            "mamba_cache_mode",
            "mamba_ssm_cache_dtype",
            "user_specified_block_size",
            "num_gpu_blocks",
        ],
    },
    "config/compilation.py": {"CompilationConfig": ["_attention_ops"]},
    "config/kv_transfer.py": {
        "KVTransferConfig": ["kv_connector", "kv_connector_extra_config"],
    },
    "distributed/kv_transfer/kv_connector/v1/ssm_conv_transfer_utils.py": {
        "MambaConvSplitInfo": [
            *("conv_rows", "local_proj_dims", "conv_dtype_size", "ssm_sizes"),
        ],
    },
    "distributed/kv_transfer/kv_connector/v1/nixl/metadata.py": {
        "ReqMeta": ["local_block_ids", "remote"],
        "RemoteMeta": ["num_tokens"],
    },
    "config/model.py": {
        "ModelConfig": [
            *("enforce_eager", "hf_overrides", "quantization", "multimodal_config"),
            "max_model_len",
        ],
    },
    "config/multimodal.py": {
        "MultiModalConfig": [
            *("language_model_only", "mm_device_do_normalize", "mm_encoder_only"),
            *("video_pruning_rate", "mm_processor_kwargs", "mm_processor_cache_type"),
        ],
    },
    "v1/worker/gpu_input_batch.py": {
        "CachedRequestState": ["mm_features", "mrope_positions", "mrope_position_delta"],
    },
    "config/load.py": {"LoadConfig": ["load_format"]},
    "config/lora.py": {"LoRAConfig": ["target_modules"]},
    "config/parallel.py": {
        "ParallelConfig": [
            *("distributed_executor_backend", "worker_cls", "data_parallel_size"),
            *("data_parallel_index", "data_parallel_size_local", "data_parallel_external_lb"),
            *("enable_expert_parallel", "reconfigure_for_independent_dp_rank"),
            "enable_ep_weight_filter",
        ],
    },
    "platforms/interface.py": {"Platform": ["device_type"]},
    "config/scheduler.py": {"SchedulerConfig": ["scheduler_cls", "max_num_batched_tokens"]},
    "v1/core/kv_cache_utils.py": {"KVCacheBlock": ["is_null"]},
    "config/speculative.py": {
        "SpeculativeConfig": [
            *("draft_sample_method", "rejection_sample_method", "disable_padded_drafter_batch"),
            *("enable_adaptive_verification", "kv_cache_dtype", "target_model_config"),
        ],
    },
    "v1/spec_decode/metadata.py": {
        "SpecDecodeMetadata": [
            *("draft_token_ids", "num_draft_tokens", "cu_num_draft_tokens"),
            *("cu_num_sampled_tokens", "target_logits_indices", "bonus_logits_indices"),
            "logits_indices",
        ],
    },
}
# What vLLM tells its sampler of each request: the coupled sampler spreads every one of these.
SAMPLING_METADATA = {
    "temperature",
    "all_greedy",
    "all_random",
    "top_p",
    "top_k",
    "generators",
    "max_num_logprobs",
    "no_penalties",
    "prompt_token_ids",
    "frequency_penalties",
    "presence_penalties",
    "repetition_penalties",
    "output_token_ids",
    "allowed_token_ids_mask",
    "bad_words_token_ids",
    "logitsprocs",
    "logprob_token_ids",
    "spec_token_ids",
    "thinking_budget_state_holder",
}
# What the worker and the coupled sampler read of objects that set it in a method.
ATTRIBUTES = {
    "v1/worker/gpu_worker.py": ["use_v2_model_runner", "model_runner"],
    "v1/worker/gpu_model_runner.py": [
        "rejection_sampler",
        "sampler",
        "input_batch",
        "discard_request_mask",
        "effective_drafter_max_model_len",
        "num_spec_tokens",
        "max_model_len",
        "max_num_tokens",
        "positions",
    ],
    "v1/worker/gpu_input_batch.py": [
        *("generators", "num_reqs", "logitsprocs", "vocab_size", "num_logprobs"),
    ],
    "v1/spec_decode/llm_base_proposer.py": [
        *("input_ids", "block_size", "draft_model_config", "supports_mm_inputs"),
    ],
    "model_executor/layers/fused_moe/unquantized_fused_moe_method.py": ["experts_cls"],
    "v1/sample/logits_processor/builtin.py": ["min_p", "min_p_count", "biases"],
}
# What a host's class keeps on itself, and our subclass of it reads.
KEPT = {
    "v1/worker/gpu/model_states/interface.py": {"ModelState": ["max_num_reqs"]},
    "v1/core/sched/scheduler.py": {
        "Scheduler": [
            *("log_stats", "running", "kv_cache_manager", "kv_cache_config", "vllm_config"),
            "num_waiting_for_streaming_input",
        ],
    },
    "v1/request.py": {"Request": ["mm_features", "request_id"]},
    "v1/executor/abstract.py": {"Executor": ["kv_output_aggregator", "ec_output_aggregator"]},
    "v1/executor/multiproc_executor.py": {"MultiprocExecutor": ["output_rank"]},
    "distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py": {
        "NixlBaseConnectorWorker": [
            *("vllm_config", "kv_cache_config", "device_kv_caches", "_recving_metadata"),
        ],
    },
    "lora/lora_model.py": {"LoRAModel": ["loras"]},
    "lora/model_manager.py": {"LoRAModelManager": ["lora_config", "modules", "packed_modules"]},
    "lora/worker_manager.py": {"WorkerLoRAManager": ["_adapter_manager"]},
    "v1/core/kv_cache_manager.py": {"KVCacheManager": ["coordinator"]},
    "v1/core/kv_cache_coordinator.py": {"KVCacheCoordinator": ["single_type_managers"]},
    "v1/core/single_type_kv_cache_manager.py": {"SingleTypeKVCacheManager": ["req_to_blocks"]},
    "v1/sample/thinking_budget_state.py": {
        "ThinkingBudgetStateHolder": ["_state", "in_spec_mode", "cu_num_tokens"],
    },
    "v1/worker/gpu/model_states/mamba_hybrid.py": {
        "MambaHybridModelState": [
            "_align_mode",
            "_mamba_ctx",
            "_mamba_state_idx_gpu",
            "num_accepted_tokens_gpu",  # stays at the 1 that it starts with
        ],
    },
}


@pytest.fixture(scope="module", params=["installed", *other_hosts(HOST)])
def sources(request) -> Sources:
    return host(HOST, request.param)


def test_other_hosts_are_read_too():
    assert all(host(HOST, name).has("__init__.py") for name in other_hosts(HOST))


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


def test_a_routing_function_is_given_what_ours_takes(sources):
    path = "model_executor/layers/fused_moe/router/cpu_router.py"
    calls = keywords(sources.tree(path), "custom_routing_function")
    assert calls == [set(inspect.signature(route).parameters)]


@pytest.mark.parametrize(("path", "name"), pairs(FIELDS))
def test_fields_are_there(sources, path, name):
    owner = definition(sources.tree(path), name)
    for field in FIELDS[path][name]:
        definition(owner, field)


@pytest.mark.parametrize(("path", "name"), pairs(KEPT))
def test_attributes_are_kept(sources, path, name):
    assert set(KEPT[path][name]) <= kept(definition(sources.tree(path), name))


def test_runner_v2_asks_the_model_for_its_state_class(sources):
    assert "get_model_state_cls" in sources.names("v1/worker/gpu/model_states/__init__.py")


def test_the_sampler_is_told_what_ours_spreads(sources):
    """No more, or a parameter of a request would be taken for another's."""
    owner = definition(sources.tree("v1/sample/metadata.py"), "SamplingMetadata")
    fields = {node.target.id for node in owner.body if isinstance(node, ast.AnnAssign)}
    assert fields == SAMPLING_METADATA


@pytest.mark.parametrize(("path", "name"), pairs(ATTRIBUTES))
def test_attributes_are_set(sources, path, name):
    assert name in {
        getattr(node, "attr", None) or getattr(node, "name", None)
        for node in ast.walk(sources.tree(path))
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    }


def test_lists_of_patches_are_up_to_date():
    assert len(CHANGES) > 50
    check_modules(HOST)
    check_generated(HOST)


@pytest.mark.parametrize("entry", CHANGES, ids=lambda entry: entry.target)
def test_patches_fit(sources, entry):
    check_entry(sources, entry)


def test_entry_point_groups_are_read(sources):
    assert "vllm.general_plugins" in sources.names("plugins/__init__.py")
    processors = sources.names("v1/sample/logits_processor/__init__.py")
    assert "vllm.logits_processors" in processors


@pytest.mark.parametrize("name", MODELS)
def test_architecture_names_are_the_hosts(sources, name):
    assert name in sources.names("model_executor/models/registry.py")


def test_entries_of_the_hosts_own_config_map_are_called_first(sources):
    """Ours would hide them. They are for two models, and touch the positions and S's dtype."""
    tree = sources.tree("model_executor/models/config.py")
    entries = definition(tree, "MODELS_CONFIG_MAP").value
    theirs = {key.value: value.id for key, value in zip(entries.keys, entries.values, strict=True)}
    known = {
        "Qwen3_5ForCausalLM": "Qwen3_5ForCausalLMConfig",
        "Qwen3_5MoeForCausalLM": "Qwen3_5ForCausalLMConfig",
        "Qwen3_5ForConditionalGeneration": "Qwen3_5ForConditionalGenerationConfig",
        "Qwen3_5MoeForConditionalGeneration": "Qwen3_5ForConditionalGenerationConfig",
        "Qwen4ExpForCausalLM": "Qwen4ExpForCausalLMConfig",
        "Qwen4ExpForConditionalGeneration": "Qwen4ExpForConditionalGenerationConfig",
    }
    expected = {name: config for name, config in known.items() if name in TRUNKS}
    assert {name: theirs[name] for name in TRUNKS if name in theirs} == expected
    called = []
    for name in ("Host", "Ours"):
        check = staticmethod(lambda vllm_config, name=name: called.append((name, vllm_config)))
        called.append(type(name, (), {"verify_and_update_config": check}))
    host, ours = called
    called.clear()
    MODELS_CONFIG_MAP["a model"] = host
    try:
        after_hosts("a model", ours).verify_and_update_config("flags")
    finally:
        del MODELS_CONFIG_MAP["a model"]
    assert called == [("Host", "flags"), ("Ours", "flags")]
    assert after_hosts("another model", ours) is ours


def test_prompts_are_still_cut_at_blocks(sources):
    """Our layers leave a page at a chunk's end only, so none may promise one inside (from 0.33)."""
    base = definition(sources.tree("model_executor/layers/mamba/abstract.py"), "MambaBase")
    name = "get_prefill_checkpoint_alignment"
    found = [node for node in base.body if getattr(node, "name", None) == name]
    assert all(ast.unparse(node.body[-1]) == "return None" for node in found)
