"""Everything of SGLang that the plugin changes: what, why, for which versions, and until when.

ANYWHERE is applied on every device; WITH_OURS and REPAIRS where our model serves, with ON_CPU and
REPAIRS_ON_CPU, or with ON_GPU; ELSEWHERE where SGLang's own model serves. All are applied at
registration. OVERRIDES are changes that our own subclasses make to objects of theirs.
"""

from collections.abc import Sequence
from functools import partial

from sglang.srt.arg_groups import overrides
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin.engines import patching
from qwen3next_plugin.engines.patching import Entry, Function, Host
from qwen3next_plugin.engines.sglang import flags, hooks, pacing, staged_updates, updates
from qwen3next_plugin.engines.sglang.cpu import memory
from qwen3next_plugin.engines.sglang.cpu.attention_backend import create_draft_backend
from qwen3next_plugin.engines.sglang.cpu.host_bar import HostBar
from qwen3next_plugin.engines.sglang.model.config import (
    check_file,
    derive_length,
    keep_config,
    layers_block_type,
    mamba2_cache_params,
    merge_overrides,
    name_drafter,
    no_profile,
)
from qwen3next_plugin.engines.sglang.names import STREAMS, WRAPPERS
from qwen3next_plugin.engines.sglang.repairs import (
    aborts,
    controls,
    endings,
    grammars,
    image_names,
    logits,
    nodes,
    patterns,
    penalties,
    prompts,
    requests,
    rows,
    sessions,
    stops,
    tokenised,
)
from qwen3next_plugin.engines.sglang.speculation import penalties as penalties_of_drafts
from qwen3next_plugin.engines.sglang.speculation import verify
from qwen3next_plugin.engines.sglang.state import handover
from qwen3next_plugin.versions import check_host

VERSIONS = "==0.5.23"  # that need these patches
Patch = partial(patching.Patch, versions=VERSIONS)
Attribute = partial(patching.Attribute, versions=VERSIONS)
Override = partial(patching.Override, versions=VERSIONS)

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
UPDATES = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
TRANSFERS = "sglang.srt.disaggregation.common.conn"
RESULTS = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
)
PROFILES = "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager"

ANYWHERE: tuple[Entry, ...] = (
    Patch(
        target="sglang.srt.arg_groups.speculative_hook._handle_eagle_family",
        parameters=("server_args",),
        function=flags.complete_drafts,
        reason="Qwen's own command gives only the steps; SGLang then compares a missing topk with "
        "1 and ends with a TypeError",
        remove_when="SGLang fills in the rest",
    ),
)

ELSEWHERE: tuple[Entry, ...] = (
    Patch(
        target="sglang.srt.arg_groups.platform_hook.handle_platform_defaults",
        parameters=("server_args",),
        function=hooks.say_no_kernels,
        reason="the log must say that SGLang's own model serves",
        remove_when="there are kernels for every platform",
    ),
)

ON_GPU: tuple[Entry, ...] = (
    Patch(
        target="sglang.srt.arg_groups.platform_hook.handle_platform_defaults",
        parameters=("server_args",),
        function=hooks.check_on_gpu,
        reason="flags must be checked before a process starts; on GPUs SGLang asks its own "
        "platforms, and no plugin",
        remove_when="a plugin can check flags on a GPU",
    ),
    Patch(
        target="sglang.srt.speculative.adaptive_runtime_state.AdaptiveController.__init__",
        parameters=("self", "worker", "policy"),
        function=hooks.choose_policy,
        reason="SGLang's policy does not know what a step costs",
        remove_when="SGLang asks a plugin for the policy",
    ),
    Patch(
        target="sglang.srt.model_loader.loader._get_quantization_config",
        parameters=("model_config", "load_config"),
        function=hooks.leave_plain_modules,
        reason="SGLang reads formats from config.json, which does not name all unquantised modules",
        remove_when="SGLang reads formats from the files",
    ),
)

WITH_OURS: tuple[Entry, ...] = (
    Patch(
        target="sglang.srt.arg_groups.muse_spark_hook.apply_muse_spark_env_defaults",
        parameters=("server_args",),
        function=check_file,
        reason="the first that reads config.json; a damaged one ends SGLang in errors that name no "
        "file, or makes it list the layers of any number of them",
        remove_when="SGLang checks the file's types, and names it",
    ),
    Patch(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.__init__",
        parameters=(
            "self",
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "hidden_act", "output_gate_type"),
            *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
            *("tie_word_embeddings", "rope_theta", "rope_scaling", "partial_rotary_factor"),
            *("attention_bias", "attention_dropout", "head_dim", "linear_conv_kernel_dim"),
            *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads"),
            *("linear_num_value_heads", "decoder_sparse_step", "moe_intermediate_size"),
            *("shared_expert_intermediate_size", "num_experts_per_tok", "num_experts"),
            *("norm_topk_prob", "output_router_logits", "router_aux_loss_coef"),
            *("mlp_only_layers", "layer_types", "kwargs"),
        ),
        function=keep_config,
        reason="SGLang drops layer_types and rope_parameters of a newer config.json, and has 512 "
        "experts in a dense Qwen3.5",
        remove_when="SGLang reads all three",
    ),
    Patch(
        target="sglang.srt.configs.model_config.get_config",
        parameters=(
            *("model", "trust_remote_code", "revision", "model_override_args"),
            *("model_config_parser", "kwargs"),
        ),
        function=merge_overrides,
        reason="an override of a nested text model's RoPE replaces all of it, and one of "
        "rope_scaling has no effect there; and Qwen4-Exp is a text model on a CPU",
        remove_when="SGLang merges it, at either level, and lets a plugin change a config",
    ),
    Patch(
        target="sglang.srt.configs.model_config.ModelConfig._derive_context_length",
        parameters=("self", "context_length"),
        function=derive_length,
        reason="SGLang ignores YaRN's factor in the longest context, and asks for "
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN",
        remove_when="SGLang derives the length from YaRN's original one and factor (`compat`)",
    ),
    Attribute(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.layers_block_type",
        value=property(layers_block_type),
        reason="SGLang derives layers from full_attention_interval, which transformers 5 does not "
        "write",
        remove_when="SGLang reads layer_types",
    ),
    Attribute(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.mamba2_cache_params",
        value=property(mamba2_cache_params),
        reason="SGLang's pools hold a state per draft; ours hold one page per request",
        remove_when="a config can give its own cache parameters",
    ),
    Attribute(
        target="sglang.srt.server_args.ServerArgs.LANGUAGE_MODEL_ONLY_ARCHITECTURES",
        value=(*ServerArgs.LANGUAGE_MODEL_ONLY_ARCHITECTURES, *WRAPPERS, STREAMS),
        reason="--language-model-only serves a vision-language model without its tower",
        remove_when="SGLang has the flag for Qwen3.5",
    ),
    Patch(
        target="sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool._init_mamba_pool",
        parameters=(
            *("self", "mamba_size", "mamba_spec_state_size", "cache_params", "mamba_layer_ids"),
            *("device", "enable_mamba_extra_buffer", "speculative_num_draft_tokens"),
            *("speculative_eagle_topk", "enable_linear_replayssm", "linear_replayssm_cache_len"),
            *("mamba_envelope_layout", "enable_linear_replayssm_spec", "short_conv_layer_ids"),
            *("short_conv_state_shape", "ngram_context_len", "ngram_eos_token_id"),
        ),
        function=hooks.make_page_pool,
        reason="our pool copies whole pages",
        remove_when="a config can name its pool's class",
    ),
    Patch(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._get_ple_req_pool_kwargs",
        parameters=("self",),
        function=hooks.no_ngram_pools,
        reason="our pages hold what n-gram embeddings keep, and SGLang takes no list of eos tokens",
        remove_when="a config can name its pool's class",
    ),
    Patch(
        target="sglang.srt.mem_cache.kv_cache_configurator._pd_prefill_skips_mamba_spec_state",
        parameters=(),
        function=hooks.skip_snapshots,
        reason="SGLang reserves a state per draft; our page can roll back by itself",
        remove_when="a config can say that it needs none",
    ),
    Patch(
        target="sglang.srt.layers.attention.attention_registry.attn_backend_wrapper",
        parameters=("runner", "full_attn_backend"),
        function=hooks.wrap_backend,
        reason="SGLang chooses the linear-attention backend of built-in models itself",
        remove_when="a registered backend can serve a built-in architecture",
    ),
)

ON_CPU: tuple[Entry, ...] = (
    Patch(
        target="sglang.srt.model_loader.loader._get_quantization_config",
        parameters=("model_config", "load_config"),
        function=hooks.choose_quantisation,
        reason="SGLang's kernels for quantised weights run on GPUs, or with AMX at best; and it "
        "reads formats from config.json, which does not name all unquantised modules",
        remove_when="SGLang lets a plugin bring a quantisation for a model",
    ),
    Attribute(
        target="sglang.srt.model_loader.weight_utils.tqdm",
        value=HostBar,
        reason="SGLang's bar counts files, stands still for minutes in a large one, and would run "
        "beside ours",
        remove_when="SGLang has a flag that hides its bar",
    ),
    Patch(
        target="sglang.srt.configs.model_config.ModelConfig._verify_quantization",
        parameters=("self",),
        function=hooks.accept_packed,
        reason="SGLang refuses the quant_method of checkpoints that `qwen3next pack` wrote",
        remove_when="SGLang lets a plugin bring a quantisation for a model",
    ),
    Patch(
        target="sglang.srt.model_executor.model_runner.ModelRunner."
        "check_quantized_moe_compatibility",
        parameters=("self",),
        function=hooks.skip_for_ours,
        reason="SGLang refuses experts that its FP8 blocks do not divide; our kernels take them",
        remove_when="SGLang asks the quantisation whether it can split experts so",
    ),
    Patch(
        target="sglang.srt.model_executor.model_runner.ModelRunner.init_lora_manager",
        parameters=("self",),
        function=hooks.make_adapters,
        reason="SGLang's layers with adapters pin memory, which fails without a GPU, and do not "
        "load adapters of in_proj_qkv, z, b and a",
        remove_when="SGLang serves adapters of Qwen3.5 on a CPU",
    ),
    Patch(
        target="sglang.srt.utils.common.get_free_cpu_memory",
        parameters=(),
        function=memory.free_memory,
        reason="SGLang knows the topmost cgroup's limit alone, and counts files in memory as used",
        remove_when="SGLang reads /proc/self/cgroup, and leaves out what memory.stat has of files",
    ),
    Patch(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._handle_max_mamba_cache",
        parameters=("self", "total_rest_memory"),
        function=memory.modest_pools,
        reason="SGLang's pools take nearly all memory that is free",
        remove_when="SGLang asks a platform how much memory to use",
    ),
    Patch(
        target="sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        parameters=("model_config", "load_config", "tp_size"),
        function=hooks.set_sizes,
        reason="SGLang pads head counts and widths for its AMX kernels; ours take any, and our "
        "checks compare a checkpoint with its own config. An indexer's keys need room in the pool",
        remove_when="SGLang pads for its AMX kernels only, and asks a model what KV has room for",
    ),
    Attribute(
        target="sglang.srt.arg_groups.overrides._MAMBA_RADIX_CACHE_ARCHS",
        value=overrides._MAMBA_RADIX_CACHE_ARCHS | {STREAMS},
        reason="SGLang knows Qwen4-Exp by another name, for which it has code for GPUs",
        remove_when="SGLang serves Qwen4ExpForCausalLM",
    ),
    Patch(
        target="sglang.srt.configs.model_config.ModelConfig._config_draft_model",
        parameters=("self",),
        function=name_drafter,
        reason="SGLang knows Qwen4-Exp by another name, for which it has code for GPUs",
        remove_when="SGLang serves Qwen4ExpForCausalLM",
    ),
    Patch(
        target="sglang.srt.layers.attention.qsa.config.parse_qsa_profile",
        parameters=("config",),
        function=no_profile,
        reason="SGLang's pools of sparse attention are of pages of 64 tokens, in bf16, for kernels "
        "on GPUs",
        remove_when="SGLang's sparse attention runs on a CPU",
    ),
    Patch(
        target="sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend",
        parameters=("self", "backend_name", "backend_map", "error_template", "stamps_children"),
        function=create_draft_backend,
        reason="our attention backend must draft too; SGLang ties its own to AMX",
        remove_when="SGLang has an attention backend that drafts on every CPU",
    ),
    Patch(
        target="sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        parameters=("self",),
        function=hooks.skip_for_ours,
        reason="seeds need --enable-deterministic-inference, for which SGLang replaces products by "
        "Triton kernels, and ends without a GPU",
        remove_when="SGLang has seeds on a CPU",
    ),
    Patch(
        target="sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker",
        parameters=("self", "server_args"),
        function=hooks.choose_worker,
        reason="each request needs its own draft length",
        remove_when="SGLang asks an in-tree platform for its worker",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.update_running_batch",
        parameters=("self", "batch"),
        function=hooks.choose_step,
        reason="a step without drafts must cost what it costs without NEXTN; SGLang prepares every "
        "step for drafts",
        remove_when="SGLang runs steps without drafts as without NEXTN",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.init_metrics_reporter",
        parameters=("self",),
        function=hooks.choose_reporter,
        reason="SGLang's reporter knows neither draft lengths nor state pages",
        remove_when="the reporter's class can be given",
    ),
    Patch(
        target=f"{SCHEDULER}.run_batch",
        parameters=("self", "batch", "pp_proxy_tensors"),
        function=pacing.time_step,
        reason="SGLang does not learn what steps take",
        remove_when="SGLang bounds the time of a step",
    ),
    Patch(
        target=f"{SCHEDULER}._get_new_batch_prefill_raw",
        parameters=("self", "prefill_delayer_single_pass", "running_batch"),
        function=pacing.read_prompts,
        reason="SGLang reads prompts chunk by chunk before anybody decodes, each chunk as large as "
        "fits memory, and one prompt to its end before another begins",
        remove_when="SGLang bounds the time of a step",
    ),
    Patch(
        target=f"{SCHEDULER}.get_prefill_adder_class",
        parameters=("self",),
        function=pacing.reserve,
        reason="SGLang knows one prompt that is read in part",
        remove_when="SGLang reads several prompts in part",
    ),
    Patch(
        target="sglang.srt.managers.schedule_policy.PrefillAdder._select_prefill_admission",
        parameters=(
            *("self", "req", "total_tokens", "host_hit_length", "swa_host_hit_length"),
            *("truncation_align_size", "has_chunked_req"),
        ),
        function=pacing.keep_whole,
        reason="the same",
        remove_when="SGLang reads several prompts in part",
    ),
    Patch(
        target=f"{SCHEDULER}.stash_chunked_request",
        parameters=("self", "req"),
        function=pacing.publish_at_ends,
        reason="SGLang keeps a state for each chunk, of which there would be too many",
        remove_when="SGLang bounds the time of a step",
    ),
    Patch(
        target=f"{SCHEDULER}.process_pending_chunked_abort",
        parameters=("self",),
        function=pacing.end_aside,
        reason="SGLang knows one prompt that is read in part",
        remove_when="SGLang reads several prompts in part",
    ),
    Patch(
        target=f"{SCHEDULER}.pause_generation",
        parameters=("self", "recv_req"),
        function=pacing.retract_aside,
        reason="the same",
        remove_when="SGLang reads several prompts in part",
    ),
    Patch(
        target="sglang.srt.speculative.eagle_utils.eagle_sample",
        parameters=(
            *("verify_input", "batch", "logits_output", "grammar_mask", "uno_target_max_top_k"),
            *("watermark_state", "watermark_full_mask"),
        ),
        function=verify.sample_as_plain,
        reason="SGLang verifies greedily on a CPU, whatever the temperature, and elsewhere samples "
        "with other limits and other seeds than its plain sampler",
        remove_when="SGLang's verification samples what its plain sampler samples",
    ),
    Patch(
        target="sglang.srt.layers.sampler.Sampler.__init__",
        parameters=("self",),
        function=hooks.use_log_softmax,
        reason="at a temperature SGLang takes logarithms of rounded probabilities; only "
        "--enable-deterministic-inference, which gives all requests one seed, changes that",
        remove_when="SGLang takes log_softmax of logits without that flag",
    ),
    Patch(
        target="sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward",
        parameters=("self",),
        function=penalties_of_drafts.keep_penalizers,
        reason="SGLang hands a verification the penalties of each request's last token, which do "
        "not count the drafts before a row",
        remove_when="SGLang's verification counts drafts for penalties and min_new_tokens",
    ),
    Patch(
        target="sglang.srt.speculative.spec_utils.commit_mamba_states_after_verify",
        parameters=(
            *("target_worker", "batch", "accept_lens", "accept_index", "draft_token_num"),
            "prepared_step_indices",
        ),
        function=hooks.commit_trees,
        reason="SGLang computes which states of a chain to keep; a page keeps all",
        remove_when="SGLang asks the backend whether there is something to commit",
    ),
    Patch(
        target="sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
        parameters=("self", "req", "up_to", "kwargs"),
        function=hooks.keep_prefix,
        reason="SGLang gives a linker the new nodes of a prompt before the MTP layer has read it, "
        "and no node above them, in which a file of KV may begin",
        remove_when="SGLang tells a linker when a request has ended, with its whole prefix",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.init_disaggregation",
        parameters=("self",),
        function=handover.beside_computation,
        reason="SGLang's NIXL backend takes the memory of KV and states for a GPU's, NIXL's thread "
        "keeps a core busy, and with AMX threads inherit the one core of the thread that computes",
        remove_when="SGLang registers memory by its device, and NIXL waits for data",
    ),
    Patch(
        target=f"{TRANSFERS}.CommonKVManager.try_ensure_parallel_info",
        parameters=("self", "bootstrap_addr"),
        function=handover.survive_others,
        reason="a prefill server of another page size, or of ranks that do not divide ours, ends "
        "the decode server",
        remove_when="SGLang fails a request whose prefill server does not match",
    ),
    *(
        Patch(
            target=f"sglang.srt.disaggregation.{name}.add",
            parameters=parameters,
            function=handover.refuse_same_room,
            reason="two requests of one room end the prefill server, or wait forever",
            remove_when="SGLang refuses a room that is in use",
        )
        for name, parameters in (
            ("prefill.PrefillBootstrapQueue", ("self", "req", "num_kv_heads")),
            ("decode.DecodePreallocQueue", ("self", "req", "is_retracted", "is_rebootstrap")),
        )
    ),
    Patch(
        target=f"{TRANSFERS}.CommonKVManager.register_to_bootstrap",
        parameters=("self",),
        function=handover.with_what_is_alike,
        reason="SGLang compares neither weights nor states between two servers",
        remove_when="a model can add to what is compared",
    ),
    Patch(
        target=f"{TRANSFERS}.CommonKVReceiver.init",
        parameters=("self", "prefill_dp_rank"),
        function=handover.refuse_others,
        reason="a page of another size would be written beside its place; where SGLang compares, "
        "it ends the decode server",
        remove_when="SGLang fails a request whose prefill server has other states",
    ),
    Patch(
        target="sglang.srt.disaggregation.decode.DecodeTransferQueue.resolve_deferred_releases",
        parameters=("self",),
        function=handover.hold_what_may_be_written,
        reason="30 seconds after an abort SGLang gives memory that a prefill server may still "
        "write to another request",
        remove_when="SGLang keeps it while that server runs and has not said that it is done",
    ),
    Patch(
        target="sglang.srt.disaggregation.decode.DecodePreallocQueue._send_kv_metadata",
        parameters=(
            *("self", "decode_req", "kv_indices", "page_size", "state_indices"),
            "metadata_kwargs",
        ),
        function=handover.begin_unread_page,
        reason="SGLang checks a decode server's health with requests whose state it leaves as it "
        "was; a page says where it continues, which ends the server",
        remove_when="SGLang's checks have a prefill, or a pool is asked for their states",
    ),
    Patch(
        target=f"{UPDATES}.update_weights_from_disk",
        parameters=("self", "recv_req"),
        function=updates.update_from_disk,
        reason="SGLang loads into parameters, which packing has dropped, and what is wrong shows "
        "when some weights are replaced",
        remove_when="SGLang asks the model to check and to load",
    ),
    *(
        Patch(
            target=f"{UPDATES}.{name}",
            parameters=("self", "recv_req"),
            function=function,
            reason="SGLang loads a call's tensors before it has the next call's, into parameters "
            "which packing has dropped",
            remove_when="SGLang checks a session's tensors together, and asks the model to load",
        )
        for name, function in (
            ("begin_weight_update", staged_updates.begin),
            ("update_weights_from_tensor", staged_updates.add_sent),
            ("update_weights_from_distributed", staged_updates.add_broadcast),
            ("end_weight_update", staged_updates.end),
        )
    ),
)

# Of SGLang for any model; each function is in repairs/.
DEAR = "one call of a grammar may take minutes, and nothing ends it but the end of its process"
LIMITED = "the libraries of grammars limit the time and memory of each call"
BACKEND = "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend"
REPAIRS: tuple[Entry, ...] = (
    Patch(
        target="sglang.srt.managers.load_snapshot.shm_path_for",
        parameters=("ipc_name",),
        function=endings.mark_loads,
        reason="each server leaves 16 KB in /dev/shm, by a name that no later start can call ours",
        remove_when="SGLang removes the file",
    ),
    Patch(
        target="sglang.srt.entrypoints.http_server.launch_server",
        parameters=(
            *("server_args", "init_tokenizer_manager_func", "run_scheduler_process_func"),
            *("run_detokenizer_process_func", "execute_warmup_func", "launch_callback"),
        ),
        function=endings.end_quietly,
        reason="Ctrl-C ends SGLang in a traceback, and leaves the file above",
        remove_when="it ends without either",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.init_tokenizer",
        parameters=("self",),
        function=grammars.fork_first,
        reason=DEAR,
        remove_when=LIMITED,
    ),
    Patch(
        target=f"{BACKEND}._init_value_dispatch",
        parameters=("self", "key", "require_reasoning"),
        function=grammars.compile_apart,
        reason=DEAR,
        remove_when=LIMITED,
    ),
    Patch(
        target=f"{BACKEND}.set_cache",
        parameters=("self", "key", "value"),
        function=grammars.keep_nothing,
        reason="SGLang keeps every grammar that a client ever sent",
        remove_when="its cache has a bound",
    ),
    Patch(
        target="sglang.srt.constrained.grammar_manager.GrammarManager.get_ready_grammar_requests",
        parameters=("self",),
        function=grammars.refuse_together,
        reason="ranks that time a grammar, each for itself, may disagree",
        remove_when=LIMITED,
    ),
    Patch(
        target="sglang.srt.speculative.spec_utils.generate_token_bitmask",
        parameters=(
            *("reqs", "retrieve_next_token_cpu", "retrieve_next_sibling_cpu", "draft_tokens_cpu"),
            "vocab_size",
        ),
        function=grammars.learn_drafts,
        reason="SGLang asks grammars token after token, and each answer takes 0.1 ms",
        remove_when="the entries above are removed",
    ),
    Patch(
        target=f"{RESULTS}.advance_grammar_fsm",
        parameters=("self", "result", "batch"),
        function=grammars.learn_accepted,
        reason="as above",
        remove_when="as above",
    ),
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        parameters=("self", "obj", "request"),
        function=requests.check_request,
        reason="SGLang accepts requests that end its scheduler or fill its queue for hours",
        remove_when="SGLang refuses every request of test_hostile.py",
    ),
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        parameters=(
            *("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs"),
            "token_type_ids",
        ),
        function=tokenised.check_tokenised,
        reason="SGLang's scheduler relies on types, positions and embeddings that are not checked",
        remove_when="SGLang refuses every request of test_hostile.py",
    ),
    Patch(
        target="sglang.srt.session.session_controller.Session.create_req",
        parameters=(
            *("self", "req", "tokenizer", "vocab_size", "eos_token_ids", "disagg_mode"),
            "req_factory",
        ),
        function=sessions.continue_in_session,
        reason="a request that replaces a session's earlier ones, a streaming turn without a token "
        "to read, or one beside a refused one ends SGLang's scheduler; drafts that were accepted "
        "behind a stop token are part of the next turn",
        remove_when="SGLang serves the sessions of test_hostile.py, and NEXTN changes no turn",
    ),
    Patch(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        parameters=("self", "req", "has_chunked_req", "truncation_align_size"),
        function=sessions.add_turn,
        reason="with --disable-radix-cache, a streaming turn with ignore_eos that is cut into "
        "chunks ends SGLang's scheduler",
        remove_when="add_one_req_ignore_eos takes a request with a prefix",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
        parameters=("self", "running_batch"),
        function=sessions.make_room,
        reason="idle streaming sessions keep rows, state pages and tokens, in the end all of them",
        remove_when="SGLang evicts idle sessions as it evicts cached prefixes",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.abort_request",
        parameters=("self", "recv_req"),
        function=aborts.abort_one,
        reason="a client that names its request `a` and leaves would abort others' requests",
        remove_when="SGLang compares whole names",
    ),
    Patch(
        target="sglang.srt.mem_cache.kv_cache_configurator.get_req_to_token_extra_context_len",
        parameters=(),
        function=rows.with_reserve,
        reason="with draft trees, or 8 drafts, a step reserves more tokens than a request has "
        "places, which ends the scheduler near the context's end",
        remove_when="SGLang counts the reserve for pages of one token, too",
    ),
    Patch(
        target="sglang.srt.managers.schedule_batch.Req._check_str_based_finish",
        parameters=("self", "new_accepted_len"),
        function=patterns.end_dear,
        reason="a stop_regex that backtracks, or a dear grammar, blocks the scheduler forever",
        remove_when="SGLang and its libraries of grammars match with a time limit",
    ),
    Patch(
        target="sglang.srt.managers.schedule_batch.MultimodalDataItem.set_pad_value",
        parameters=("self",),
        function=image_names.name_with_its_shape,
        reason="an image is found in caches by its patches alone, which another shape may share",
        remove_when="SGLang hashes the grid, too",
    ),
    Patch(
        target="sglang.srt.managers.schedule_batch.Req.update_finish_state",
        parameters=("self", "new_accepted_len"),
        function=stops.stop_at_first,
        reason="of the tokens of a verification, SGLang takes the stop string that is listed first "
        "for the end, and any string before a stop token",
        remove_when="SGLang's answers end at the earliest token, with drafts too",
    ),
    *(
        Patch(
            target=f"{RESULTS}.{method}",
            parameters=("self", *parameters),
            function=function,
            reason="without drafts, and at a prompt's end, ignore_eos lets SGLang sample once more "
            "behind a grammar's end",
            remove_when="SGLang's grammars read a token before it looks for the answer's end",
        )
        for method, parameters, function in (
            ("process_batch_result_prefill", ("batch", "result"), stops.end_with_the_grammar),
            ("process_batch_result_decode", ("batch", "result"), stops.end_with_the_grammar),
            ("_accept_grammar_tokens", ("req", "tokens"), stops.read_once),
        )
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
        parameters=("self",),
        function=controls.guard,
        reason="what goes wrong while SGLang's scheduler handles a control message ends it: an "
        "unknown group of ranks, a module that is not installed, memory that is in use",
        remove_when="SGLang answers an error, whatever the message",
    ),
    Patch(
        target="sglang.srt.managers.communicator.FanOutCommunicator.__call__",
        parameters=("self", "obj"),
        function=controls.raise_failures,
        reason="as above: some answers have no field for an error, and some routes answer a 500",
        remove_when="as above",
    ),
    *(
        Patch(
            target=f"{PROFILES}.{name}",
            parameters=parameters,
            function=controls.end_profile,
            reason="a profile that cannot begin or be written ends SGLang's scheduler, in a later "
            "step too",
            remove_when="SGLang ends the profile instead",
        )
        for name, parameters in (
            ("_start_profile", ("self", "stage")),
            ("_stop_profile", ("self", "stage")),
            ("_profile_batch_predicate", ("self", "batch")),
        )
    ),
    *(
        Patch(
            target=f"sglang.srt.model_executor.model_runner_components.{module}"
            ".init_custom_process_group",
            parameters=(
                *("backend", "init_method", "timeout", "world_size", "rank", "store"),
                *("group_name", "pg_options", "device_id"),
            ),
            function=controls.wait_for_ranks,
            reason="a wrong address or rank of a group for weights stops the server for half an "
            "hour",
            remove_when="SGLang waits for other ranks beside its steps",
        )
        for module in ("weight_exporter", "weight_updater")
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.slow_down",
        parameters=("self", "recv_req"),
        function=controls.slow_down,
        reason="a sleep that is too long for a clock ends SGLang's scheduler in the next step",
        remove_when="SGLang limits it",
    ),
    Patch(
        target="sglang.srt.utils.request_logger.RequestLogger.configure",
        parameters=(
            *("self", "log_requests", "log_requests_level", "log_requests_format"),
            "log_requests_target",
        ),
        function=controls.configure_or_keep,
        reason="after a log level that SGLang does not know, every request is answered with a 500",
        remove_when="SGLang checks it first",
    ),
    Patch(
        target=f"{UPDATES}.resume_memory_occupation",
        parameters=("self", "recv_req"),
        function=controls.resume_memory,
        reason="SGLang forgets what else was released where it is asked to resume more than that",
        remove_when="SGLang resumes what was released",
    ),
)

REPAIRS_ON_CPU: tuple[Entry, ...] = (
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.init_model_worker",
        parameters=("self",),
        function=nodes.end_with_other_nodes,
        reason="a node does not notice, or late, that another one has ended",
        remove_when="SGLang ends all nodes of a server when one ends",
    ),
    Patch(
        target="sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req",
        parameters=("self", "req"),
        function=sessions.keep_computed,
        reason="with drafts SGLang continues a session after a token that was never computed",
        remove_when="a session's slot keeps no more than kv_committed_len",
    ),
    Patch(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        parameters=("self",),
        function=penalties.count_every_token,
        reason="SGLang counts one token of each request a step; a verification commits several",
        remove_when="SGLang counts all of them",
    ),
    Patch(
        target="sglang.srt.disaggregation.decode_schedule_batch_mixin"
        ".ScheduleBatchDisaggregationDecodeMixin.prepare_for_prebuilt",
        parameters=("self",),
        function=penalties.count_what_is_there_already,
        reason="after a retraction a decode server's penalties forget the answer so far",
        remove_when="SGLang counts what is there already",
    ),
    Patch(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        parameters=("self",),
        function=prompts.prepare,
        reason="after a retraction SGLang's penalties forget the answer so far; a request of "
        "embeddings ends the scheduler if a step reads it beside another",
        remove_when="SGLang counts what it reads again, and embeds the tokens of other requests",
    ),
    Patch(
        target="sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
        "._apply_post_grammar_logits_transforms",
        parameters=("self", "logits"),
        function=logits.keep_a_token,
        reason="where min_new_tokens forbids all tokens that a grammar allows, or all there are, "
        "nothing is left to sample from, which ends the scheduler",
        remove_when="SGLang's min_new_tokens leaves a token",
    ),
)

OVERRIDES: tuple[Entry, ...] = (
    Override(
        target="sglang.srt.layers.attention.intel_amx_backend.IntelAMXAttnBackend"
        ".init_forward_metadata",
        file="cpu/attention.py",
        parameters=("self", "forward_batch"),
        reason="SGLang verifies the same number of tokens for each request, and prepares buffers "
        "that our kernel does not need",
        remove_when="SGLang's CPU backend reads lengths of their own",
    ),
    Override(
        target="sglang.srt.layers.attention.intel_amx_backend.IntelAMXAttnBackend.forward_extend",
        file="cpu/attention.py",
        parameters=("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "sinks"),
        reason="SGLang prepares arguments for any model, which in a short step takes longer than "
        "the attention",
        remove_when="SGLang lets a CPU backend name its kernel",
    ),
    Override(
        target="sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head",
        file="cpu/quantisation.py",
        parameters=("self", "hidden_states", "lm_head", "embedding_bias", "out"),
        reason="SGLang multiplies by the plain weight, which oneDNN repacks each time",
        remove_when="SGLang packs a head on any CPU",
    ),
    Override(
        target="sglang.srt.layers.logprob_processor.InputLogprobProcessor"
        ".enable_fast_input_logprobs",
        file="model/vocabulary.py",
        reason="SGLang sums a prompt token's probabilities in another order than a sampled one's",
        remove_when="SGLang's log-probabilities have one order",
    ),
    Override(
        target="sglang.srt.layers.linear.LinearBase.quant_method",
        file="cpu/quantisation.py",
        reason="SGLang packs projections for AMX only",
        remove_when="SGLang packs them on any CPU",
    ),
    Override(
        target="sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.forward_cpu",
        file="cpu/experts.py",
        parameters=("self", "layer", "dispatch_output"),
        reason="without AMX, SGLang loops over the experts",
        remove_when="SGLang has fused experts for any CPU",
    ),
)

TABLE: tuple[Entry, ...] = (
    *(*ANYWHERE, *ELSEWHERE, *ON_GPU, *WITH_OURS, *ON_CPU),
    *(*REPAIRS, *REPAIRS_ON_CPU, *OVERRIDES),
)


def host() -> Host:
    """The installed SGLang; raises HostVersionError unless it is a tested version."""
    return Host("SGLang", check_host("sglang"))


def apply(entries: Sequence[Entry]) -> None:
    """Check and apply groups."""
    patching.apply(entries, host(), register_hooks)


def register_hooks(patches: Sequence[Function]) -> None:
    """Put functions in place through SGLang's own registry."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for patch in patches:
        HookRegistry.register(patch.target, patch.function, HookType.AROUND)
    HookRegistry.apply_hooks()
