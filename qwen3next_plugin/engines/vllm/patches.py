"""Everything of vLLM that the plugin changes: what, why, for which versions, and until when.

The groups differ in when they are applied: FILES, ROPE, WITH_OURS, ON_GPU and ELSEWHERE at
registration, by platform; REQUESTS, AT_START and IN_SERVER when our model's flags are complete;
IN_ENGINE and GRAMMARS at either, in every process that may run an engine; WITH_DRAFTS if flags ask
for drafts; IN_WORKER when our worker is made; WITH_LORA, PAGE_COPIES, EXCHANGES and GRAPHS when our
model is built, and HANDOVER then and before its workers start.
OVERRIDES and REPAIRS are changes that our own code makes to objects of theirs.
"""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

from qwen3next_plugin import __version__
from qwen3next_plugin.engines import patching
from qwen3next_plugin.engines.patching import Entry, Function, Host
from qwen3next_plugin.engines.vllm import flags, metrics
from qwen3next_plugin.engines.vllm.cpu import exchange, page_copy
from qwen3next_plugin.engines.vllm.model import config as configuration
from qwen3next_plugin.engines.vllm.names import (
    DRAFTERS,
    LOGGER,
    OPAQUE_OP,
    TRUNKS,
    is_ours,
    models_here,
)
from qwen3next_plugin.engines.vllm.repairs import (
    adapters,
    cgroups,
    checks,
    exit_code,
    grammars,
    graphs,
    images,
    interrupts,
    nodes,
    params,
    reloads,
)
from qwen3next_plugin.engines.vllm.speculation import drafts_flags
from qwen3next_plugin.engines.vllm.state import handover, leases
from qwen3next_plugin.engines.vllm.state.handover_flags import hands_over
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.versions import check_host

logger = init_logger(LOGGER)

VERSIONS = ">=0.32,<0.34"  # that need these patches
Patch = partial(patching.Patch, versions=VERSIONS)
Replacement = partial(patching.Replacement, versions=VERSIONS)
Item = partial(patching.Item, versions=VERSIONS)
Override = partial(patching.Override, versions=VERSIONS)


class CheckFlags(VerifyAndUpdateConfig):
    """Called while vLLM completes the configuration of our model."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot be served, fill in what was not asked for, and log what serves."""
        logger.info_once(
            "qwen3next_plugin %s serves this model on vLLM %s, with %s kernels",
            __version__,
            check_host("vllm"),
            described("cpu" if current_platform.is_cpu() else "cuda"),
        )
        flags.check(vllm_config)
        flags.complete(vllm_config)
        apply(REQUESTS)
        apply(AT_START)
        apply(GRAMMARS)
        if current_platform.is_cpu():
            apply(IN_ENGINE)
        if SERVER in sys.modules:  # else this is another program, which needs no server
            apply(IN_SERVER)
        # Runner V1 on a GPU applies neither min_p nor logit_bias to drafts.
        if vllm_config.speculative_config is not None and (
            current_platform.is_cpu() or vllm_config.use_v2_model_runner
        ):
            apply(WITH_DRAFTS)


class CheckDrafter(VerifyAndUpdateConfig):
    """Called while vLLM completes the configuration of our drafter, before that of the model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse drafts that cannot be made."""
        drafts_flags.check_drafter(model_config)


class SayNoKernels(VerifyAndUpdateConfig):
    """Called on a platform without our kernels, where vLLM's own model serves."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Log it."""
        logger.info_once(
            "qwen3next_plugin %s has no kernels for %s: vLLM %s keeps its own model",
            __version__,
            current_platform.device_name,
            check_host("vllm"),
        )


def allow_min_p_and_logit_bias(
    host: Callable[..., None], params: SamplingParams, speculative_config: Any
) -> None:
    """Hide both from vLLM's refusal, for our model."""
    if speculative_config is not None and is_ours(speculative_config.target_model_config):
        params = copy(params)
        params.min_p, params.logit_bias = 0.0, None
    host(params, speculative_config)


def after_hosts(architecture: str, ours: type[VerifyAndUpdateConfig]) -> type[Any]:
    """`ours`, which vLLM calls for this model, after vLLM's own entry, if there is one."""
    host = MODELS_CONFIG_MAP.get(architecture)
    if host is None:
        return ours

    class Both(VerifyAndUpdateConfig):
        """Called while vLLM completes the configuration of a model that it has an entry for."""

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            host.verify_and_update_config(vllm_config)
            ours.verify_and_update_config(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            host.verify_and_update_model_config(model_config)
            ours.verify_and_update_model_config(model_config)

    return Both


FILES: tuple[Entry, ...] = (
    Patch(
        target="vllm.engine.arg_utils.maybe_override_with_speculators",
        parameters=(
            *("model", "tokenizer", "trust_remote_code", "revision", "vllm_speculative_config"),
            *("hf_token", "kwargs"),
        ),
        function=configuration.check_file,
        reason="a damaged config.json ends vLLM in errors that name no file, or makes it list the "
        "layers of any number of them",
        remove_when="vLLM checks the file's types, and names it",
    ),
    Patch(
        target="vllm.config.model.get_config",
        parameters=(
            *("model", "trust_remote_code", "revision", "code_revision", "config_format"),
            *("hf_overrides_kw", "hf_overrides_fn", "kwargs"),
        ),
        function=configuration.name_file,
        reason="errors about fields that only vLLM reads name no file",
        remove_when="vLLM names it",
    ),
    Patch(
        target="vllm.engine.arg_utils.resolve_kv_cache_dtype_string",
        parameters=("kv_cache_dtype", "model_config"),
        function=configuration.keep_kv_dtype,
        reason="on a CPU, vLLM rounds keys and values to FP8 where a config.json of modelopt says "
        "so, and reads no scales",
        remove_when="vLLM reads them on a CPU",
    ),
)

ROPE: tuple[Entry, ...] = (
    Patch(
        target="vllm.config.model.ModelConfig._apply_dict_overrides",
        parameters=("self", "config", "overrides"),
        function=configuration.merge_overrides,
        reason="an override of rope_scaling replaces all of RoPE: vLLM serves with another base "
        "and all dims rotated; and it has no effect where the text model is nested",
        remove_when="vLLM merges it, at either level",
    ),
    Patch(
        target="vllm.config.model.ModelConfig.get_model_arch_config",
        parameters=("self",),
        function=configuration.derive_length,
        reason="vLLM ignores YaRN's factor in the longest context, and asks for "
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
        remove_when="vLLM derives the length from YaRN's original one and factor (`compat`)",
    ),
    Patch(
        target="vllm.engine.arg_utils.EngineArgs.add_cli_args",
        parameters=("parser",),
        function=configuration.offer_rope_scaling,
        reason="vLLM has dropped --rope-scaling, which Qwen's model cards name",
        remove_when="the cards no longer name it",
    ),
    Patch(
        target="vllm.engine.arg_utils.EngineArgs.from_cli_args",
        parameters=("cls", "args"),
        function=configuration.take_rope_scaling,
        reason="as the flag above",
        remove_when="the cards no longer name it",
    ),
)

WITH_OURS: tuple[Entry, ...] = tuple(
    Item(
        target="vllm.model_executor.models.config.MODELS_CONFIG_MAP",
        key=architecture,
        value=after_hosts(architecture, check),
        reason="flags must be checked before a worker starts; vLLM has no extension point for it",
        remove_when="a plugin's model class can check the configuration",
    )
    for architecture, check in (
        *((trunk, CheckFlags) for trunk in TRUNKS),
        *((drafter, CheckDrafter) for drafter in DRAFTERS),
    )
    if architecture in models_here()
)

ELSEWHERE: tuple[Entry, ...] = tuple(
    Item(
        target="vllm.model_executor.models.config.MODELS_CONFIG_MAP",
        key=architecture,
        value=after_hosts(architecture, SayNoKernels),
        reason="the log must say that vLLM's own model serves",
        remove_when="there are kernels for every platform",
    )
    for architecture in TRUNKS
    if architecture in models_here()
)

ON_GPU: tuple[Entry, ...] = (
    Item(
        target="vllm.config.compilation.CompilationConfig._attention_ops",
        value=OPAQUE_OP,
        reason="a piecewise CUDA graph must be cut where a step chooses its pages; vLLM's "
        "setting replaces the list and cannot add to it",
        remove_when="an op can declare that graphs are cut at it",
    ),
)

WITH_DRAFTS: tuple[Entry, ...] = (
    Patch(
        target="vllm.sampling_params.SamplingParams._validate_spec_decode",
        parameters=("self", "speculative_config"),
        function=allow_min_p_and_logit_bias,
        reason="vLLM's rejection sampler lacks min_p and logit_bias, so vLLM refuses requests with "
        "them; our verification applies both",
        remove_when="vLLM refuses neither (a test marked `compat` says when)",
    ),
)

PAGES = (  # the arguments of both kernels that say where the pages of all layers are
    *("block_table_ptrs_ptr", "block_table_stride_req", "state_base_addrs_ptr"),
    *("state_block_strides_ptr", "state_elem_sizes_ptr", "state_inner_sizes_ptr"),
    *("state_conv_widths_ptr", "state_group_indices_ptr", "state_dim_row_count_ptr"),
    "state_dim_row_stride_ptr",
)
PAGE_COPIES: tuple[Entry, ...] = (
    Replacement(
        target="vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel",
        parameters=(
            *("mamba_state_idx_ptr", "src_col_ptr", "token_bias_ptr", *PAGES, "idx_mapping_ptr"),
            *("num_reqs", "COPY_BLOCK_SIZE", "CONV_STATE_DIM_FIRST", "HAS_IDX_MAPPING"),
            "TEMPORAL_TILES",
        ),
        function=page_copy.precopy,
        reason="prefix caching with drafts copies pages by this Triton kernel, which has no CPU "
        "version: the engine would end at its first request",
        remove_when="vLLM ships a CPU version",
    ),
    Replacement(
        target="vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel",
        parameters=(
            *("num_accepted_tokens_ptr", "mamba_state_idx_ptr", "num_scheduled_tokens_ptr"),
            *("num_computed_tokens_ptr", "num_draft_tokens_ptr", *PAGES),
            *("num_accepted_tokens_out_ptr", "idx_mapping_ptr", "num_reqs", "block_size"),
            *("COPY_BLOCK_SIZE", "CONV_STATE_DIM_FIRST", "HAS_IDX_MAPPING"),
            *("PRECOMPUTED_NEW_COMPUTED", "TEMPORAL_TILES"),
        ),
        function=page_copy.postprocess,
        reason="as the kernel above",
        remove_when="vLLM ships a CPU version",
    ),
)

COMMUNICATOR = "vllm.distributed.device_communicators.base_device_communicator."
EXCHANGES: tuple[Entry, ...] = (
    Replacement(
        target=f"{COMMUNICATOR}DeviceCommunicatorBase.all_gatherv",
        parameters=("self", "input_", "dim", "sizes"),
        function=exchange.gather,
        reason="data-parallel ranks share experts by this method, which a CPU's communicator lacks:"
        " the engine would end at its first request",
        remove_when="vLLM's CPU communicator has it (`compat`)",
    ),
    Replacement(
        target=f"{COMMUNICATOR}DeviceCommunicatorBase.reduce_scatterv",
        parameters=("self", "input_", "dim", "sizes"),
        function=exchange.sum_own,
        reason="as the method above",
        remove_when="vLLM's CPU communicator has it (`compat`)",
    ),
)

GRAPHS: tuple[Entry, ...] = (
    Patch(
        target="vllm.compilation.decorators._try_load_aot_compiled_fn",
        parameters=("model", "aot_compilation_path"),
        function=graphs.load_graph,
        reason="on a CPU vLLM cannot read the graphs that it has kept, and compiles at each start",
        remove_when="vLLM reads them (`compat`)",
    ),
    Patch(
        target="torch._dynamo.package.SourceInfo.add_code",
        parameters=("self", "code"),
        function=graphs.add_code,
        reason="torch looks for a function's source at each of its calls in a graph: 8 s of a first"
        " start, with 40 layers",
        remove_when="torch looks once for each function (`compat`)",
    ),
    Override(
        target="vllm.compilation.caching.VllmSerializableFunction.finalize_loading",
        parameters=("self", "vllm_config"),
        file="repairs/graphs.py",
        reason="torch's graphs, which are whole when they are read, get a method of this name",
        remove_when="the patch above is removed",
    ),
)

NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"
NIXL_WORKER = f"{NIXL}.base_worker"
HANDOVER: tuple[Entry, ...] = (
    Patch(
        target=f"{NIXL_WORKER}.derive_mamba_conv_split",
        parameters=("mamba_spec", "local_tp"),
        function=handover.in_one_part,
        reason="vLLM's NIXL connector reads only states of its own layers, in parts by heads",
        remove_when="it reads any other state whole between equal tensor parallel sizes",
    ),
    Patch(
        target=f"{NIXL_WORKER}.compute_nixl_compatibility_hash",
        parameters=("vllm_config", "attn_backend_name", "transfer_mode"),
        function=handover.with_what_is_alike,
        reason="vLLM compares neither draft lengths nor weights nor states' dtypes, and names "
        "nothing that differs",
        remove_when="a model can add to what is compared",
    ),
    *(
        Patch(
            target=f"{NIXL}.{name}",
            parameters=parameters,
            function=function,
            reason="vLLM decodes from blocks that the other server has freed and used again",
            remove_when="vLLM fails a request whose blocks were freed before they were read",
        )
        for name, parameters, function in (
            (
                "base_scheduler.NixlBaseConnectorScheduler._nixl_handshake_listener",
                ("encoded_data", "ready_event", "stop_event", "host", "port"),
                leases.answer_about_leases,
            ),
            (
                "pull_scheduler.NixlPullConnectorScheduler.request_finished",
                ("self", "request", "block_ids"),
                leases.keep,
            ),
            (
                "base_scheduler.NixlBaseConnectorScheduler.update_connector_output",
                ("self", "connector_output"),
                leases.forget,
            ),
            (
                "pull_worker.NixlPullConnectorWorker._read_blocks",
                (
                    *("self", "read_spec", "dst_engine_id", "request_id", "remote_request_id"),
                    *("local_xfer_side_handle", "local_dram_handle", "remote_xfer_side_handle"),
                    *("expected_consumers", "awaiting_kvs"),
                ),
                leases.read_without_release,
            ),
            (
                "base_worker.NixlBaseConnectorWorker._pop_done_transfers",
                ("self", "transfers"),
                leases.ask_when_read,
            ),
        )
    ),
)

OVERRIDES: tuple[Entry, ...] = (
    Override(
        target="vllm.v1.core.sched.scheduler.Scheduler.dynamic_sd_lookup",
        file="scheduler.py",
        reason="vLLM pads a new row without a draft to the rows of a GPU's graph: on a CPU a step "
        "computes them all",
        remove_when="vLLM pads only where a graph is replayed",
    ),
    Override(
        target="vllm.v1.worker.gpu_model_runner.GPUModelRunner.rejection_sampler",
        file="speculation/worker.py",
        reason="drafts are verified by the plain sampler, so that a seed gives the same tokens "
        "with and without drafts",
        remove_when="vLLM's rejection sampler draws what its plain sampler draws (`compat`)",
    ),
    *(
        Override(
            target=f"vllm.model_executor.models.qwen3_5.{text_model}",
            file="model/wrapped.py",
            reason="vLLM's vision-language model offers no other way to replace its text model",
            remove_when="it takes the text model's class from vLLM's registry",
        )
        for text_model in ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
    ),
    Override(
        target="vllm.platforms.interface.Platform.ray_device_key",
        file="ray_executor.py",
        reason="vLLM asks Ray for devices by it, and has no key for CPUs",
        remove_when="vLLM's CPU platform has one (`compat`)",
    ),
    Override(
        target="vllm.v1.executor.ray_executor_v2.RayWorkerProc",
        file="ray_executor.py",
        reason="a worker asks Ray for its device, shares memory with those of other machines, and "
        "binds the same cores on each",
        remove_when="the entry above is removed",
    ),
    Override(
        target="vllm.v1.executor.ray_executor_v2.RayExecutorV2._get_actor_resource_kwargs",
        parameters=(),
        file="ray_executor.py",
        reason="Ray takes no CPU among an actor's custom resources",
        remove_when="the entries above are removed",
    ),
    Override(
        target="vllm.config.model_arch.ModelArchitectureConfig.num_experts",
        file="cpu/cpu_flags.py",
        reason="vLLM takes a slice of each expert for each data-parallel engine, even without "
        "expert parallelism: they would exchange tokens in each layer, and all run when one does",
        remove_when="vLLM can keep engines of a mixture of experts apart",
    ),
    Override(
        target="vllm.v1.core.sched.scheduler.Scheduler._mamba_block_aligned_split",
        parameters=(
            *("self", "request", "num_new_tokens", "num_new_local_computed_tokens"),
            "num_external_computed_tokens",
        ),
        file="scheduler.py",
        reason="the only method that vLLM asks how long a request's chunk may be; it bounds a step "
        "by tokens, which take more time the longer the context",
        remove_when="vLLM bounds the time of a step",
    ),
    *(
        Override(
            target=f"vllm.v1.core.sched.scheduler.Scheduler.{name}",
            file="scheduler.py",
            reason="that method is called, and lets a chunk end within a block, if these say so",
            remove_when="the entry above is removed",
        )
        for name in ("need_mamba_block_aligned_split", "max_num_scheduled_tokens")
    ),
    Override(
        target="vllm.v1.worker.gpu_input_batch.InputBatch.logitsprocs",
        file="speculation/worker.py",
        reason="vLLM leaves its min_p and logit_bias processors out under speculation",
        remove_when="vLLM refuses neither (`compat`)",
    ),
    Override(
        target="vllm.v1.worker.gpu_model_runner.GPUModelRunner.drafter",
        file="speculation/worker.py",
        reason="each request needs its own draft length",
        remove_when="vLLM lets a model bring its drafter",
    ),
    Override(
        target="vllm.v1.worker.gpu_model_runner.GPUModelRunner._calc_spec_decode_metadata",
        parameters=("self", "num_draft_tokens", "cu_num_scheduled_tokens"),
        file="speculation/worker.py",
        reason="vLLM prepares seven tensors, most for its rejection sampler; ours needs two",
        remove_when="vLLM leaves the metadata of drafts to the sampler",
    ),
    Override(
        target="vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states_after_model_execute",
        parameters=("self", "output_token_ids", "scheduler_output"),
        file="speculation/worker.py",
        reason="vLLM counts accepted drafts, and looks for state pages to copy, in every step",
        remove_when="vLLM does neither where nothing was drafted and no block is filled",
    ),
    Override(
        target="vllm.v1.worker.gpu_model_runner.GPUModelRunner.effective_drafter_max_model_len",
        file="speculation/worker.py",
        reason="vLLM drafts zeros for all requests when one is near its maximum length; our "
        "drafter drafts less for that one",
        remove_when="vLLM leaves that limit to the drafter",
    ),
    Override(
        target="vllm.config.speculative.SpeculativeConfig.draft_model_config",
        file="speculation/drafts_flags.py",
        reason="vLLM removes images' axes from a text model's positions, not from its drafter's",
        remove_when="the drafter's configuration is completed as the trunk's is",
    ),
    Override(
        target="vllm.config.vllm.VllmConfig.lora_config",
        file="model/moe.py",
        reason="for a model with LoRA vLLM chooses Triton experts, also on a CPU",
        remove_when="vLLM asks the platform before it chooses",
    ),
    Override(
        target="vllm.model_executor.layers.vocab_parallel_embedding."
        "VocabParallelEmbedding.quant_method",
        file="model/vocabulary.py",
        reason="on a CPU vLLM keeps a packed copy of the vocabulary's weight and the plain one; an "
        "embedding needs only the plain one, a head only the packed one",
        remove_when="vLLM keeps only the copy that a layer uses",
    ),
    Override(
        target="vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts._get_quant_method",
        parameters=("self", "prefix", "quant_config", "moe_config"),
        file="cpu/experts.py",
        reason="vLLM's portable experts convert each weight to fp32, which takes half of a "
        "prefill's time; ours multiply bf16",
        remove_when="vLLM's portable experts are as fast",
    ),
    Override(
        target="vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method."
        "UnquantizedFusedMoEMethod.experts_cls",
        file="cpu/experts.py",
        reason="as the method above",
        remove_when="vLLM's portable experts are as fast",
    ),
    Override(
        target="vllm.v1.kv_offload.cpu.shared_offload_region.SharedOffloadRegion._creator",
        file="folder.py",
        reason="vLLM's tiers leave their shared memory behind when a server is killed; ours has no "
        "name once all have opened it, so a worker has none to remove",
        remove_when="TieringOffloadingSpec removes the name, as CPUOffloadingSpec does",
    ),
    Override(
        target="vllm.v1.worker.gpu.model_states.mamba_hybrid.MambaHybridModelState.postprocess_state",
        parameters=("self", "idx_mapping", "num_sampled", "num_computed_tokens"),
        file="state/model_state.py",
        reason="vLLM copies states by accepted counts; a page is copied whole",
        remove_when="a model can declare that its state is copied whole",
    ),
)

# Of vLLM for any model; each change is in repairs/.
WITH_LORA: tuple[Entry, ...] = (
    Patch(
        target="vllm.lora.worker_manager.WorkerLoRAManager._load_adapter",
        parameters=("self", "lora_request"),
        function=adapters.refuse_unused,
        reason="vLLM ignores the parts of an adapter that fit no module",
        remove_when="vLLM refuses such an adapter (`compat`)",
    ),
)

DEAR = "one call of a grammar may take minutes, and nothing ends it but the end of its process"
LIMITED = "the libraries of grammars limit the time and memory of each call"
REQUESTS: tuple[Entry, ...] = (
    Patch(
        target="vllm.v1.engine.async_llm.AsyncLLM.__init__",
        parameters=(
            *("self", "vllm_config", "executor_class", "log_stats", "usage_context"),
            *("mm_registry", "log_requests", "start_engine_loop", "stat_loggers"),
            *("aggregate_engine_logging", "client_addresses", "client_count", "client_index"),
            "profiler",
        ),
        function=grammars.fork_first,
        reason=DEAR,
        remove_when=LIMITED,
    ),
    Patch(
        target="vllm.v1.engine.async_llm.AsyncLLM.add_request",
        parameters=(
            *("self", "request_id", "prompt", "params", "arrival_time", "lora_request"),
            *("tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank"),
            *("session_id", "prompt_text", "reasoning_ended", "reasoning_parser_kwargs"),
            "kv_hints",
        ),
        function=checks.check_beside,
        reason="a schema of a hundred bytes takes minutes, or all memory, to check, in the process "
        "that answers all clients",
        remove_when=LIMITED,
    ),
    Patch(
        target="vllm.v1.engine.async_llm.AsyncLLM.add_request",
        parameters=(
            *("self", "request_id", "prompt", "params", "arrival_time", "lora_request"),
            *("tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank"),
            *("session_id", "prompt_text", "reasoning_ended", "reasoning_parser_kwargs"),
            "kv_hints",
        ),
        function=params.check_params,
        reason="one request may ask for log-probabilities that fill the memory, or, but for "
        "OpenAI's API, for 100,000 stop strings, each of which is looked for at every token",
        remove_when="vLLM limits both",
    ),
    Patch(
        target="vllm.sampling_params.SamplingParams._validate_structured_outputs",
        parameters=("self", "model_config", "structured_outputs_config", "tokenizer"),
        function=checks.skip_checked,
        reason="the entry above has checked it",
        remove_when="the entry above is removed",
    ),
    Patch(
        target="vllm.v1.engine.output_processor.OutputProcessor.process_outputs",
        parameters=(
            *("self", "engine_core_outputs", "engine_core_timestamp", "iteration_stats"),
            "weight_version",
        ),
        function=checks.raise_why,
        reason="what is wrong with a client's grammar is an internal error to vLLM",
        remove_when="vLLM answers it with a 400 that says why",
    ),
    Patch(
        target="vllm.multimodal.processing.inputs.ProcessorInputs.get_mm_hashes",
        parameters=("self", "model_id", "hash_algorithm"),
        function=images.keep_names_apart,
        reason="a client's name of an image may be the hash of another, in the caches of all",
        remove_when="vLLM keeps given names and hashes apart",
    ),
)

AT_START: tuple[Entry, ...] = (
    Patch(
        target="vllm.v1.engine.utils.wait_for_engine_startup",
        parameters=(
            *("handshake_socket", "core_engines", "parallel_config", "coordinated_dp"),
            *("cache_config", "launch"),
        ),
        function=interrupts.end_while_loading,
        reason="vLLM ignores SIGTERM and Ctrl-C while the engine loads",
        remove_when="zmq_socket_ctx no longer swallows a KeyboardInterrupt (`compat`)",
    ),
    Patch(
        target="vllm.v1.engine.utils.CoreEngineProcManager.shutdown",
        parameters=("self", "timeout"),
        function=interrupts.give_time_to_end,
        reason="vLLM kills its engine right after SIGTERM: two shared memory objects are left",
        remove_when="vLLM gives an engine time to end where --shutdown-timeout is 0",
    ),
    Patch(
        target="vllm.v1.executor.multiproc_executor.MultiprocExecutor.start_worker_monitor",
        parameters=("self", "inline"),
        function=nodes.fail_with_a_worker,
        reason="a headless node whose worker has ended exits with 0",
        remove_when="vLLM exits with another code",
    ),
)

ENGINE = "vllm.v1.engine.core"
IGNORE_CTRL_C = partial(
    Patch,
    parameters=("self",),
    function=interrupts.let_the_server_end_it,
    reason="Ctrl-C ends engine and workers, too: in an order that leaves shared memory",
    remove_when="vLLM's processes leave SIGINT to the server",
)
IN_ENGINE: tuple[Entry, ...] = (
    Patch(
        target=f"{ENGINE}.EngineCore.collective_rpc",
        parameters=("self", "method", "timeout", "args", "kwargs"),
        function=reloads.forget_old_weights,
        reason="after reload_weights vLLM would serve cached prefixes of the old weights",
        remove_when="vLLM resets its caches then",
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler.Scheduler._make_cached_request_data",
        parameters=(
            *("self", "running_reqs", "resumed_reqs", "num_scheduled_tokens"),
            *("spec_decode_tokens", "req_to_new_blocks"),
        ),
        function=images.send_again,
        reason="a preempted request whose images were in the prefix cache ends the engine: its "
        "worker never got the pixels",
        remove_when="vLLM sends them when it resumes a request",
    ),
    IGNORE_CTRL_C(target=f"{ENGINE}.EngineCoreProc.run_busy_loop"),
    IGNORE_CTRL_C(target=f"{ENGINE}.DPEngineCoreProc.run_busy_loop"),
)

GRAMMARS: tuple[Entry, ...] = (
    Patch(
        target="vllm.v1.executor.abstract.Executor.__init__",
        parameters=("self", "vllm_config"),
        function=grammars.fork_first,
        reason=DEAR,
        remove_when=LIMITED,
    ),
    Patch(
        target="vllm.v1.structured_output.StructuredOutputManager.grammar_init",
        parameters=("self", "request"),
        function=grammars.compile_apart,
        reason=f"{DEAR}; and vLLM compiles one after another, all by the backend of the first",
        remove_when=f"{LIMITED}, and vLLM takes a backend for each request (`compat`)",
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler.Scheduler.update_from_output",
        parameters=("self", "scheduler_output", "model_runner_output"),
        function=grammars.say_why,
        reason="vLLM has no reason of an error to go with a request's last output",
        remove_when="vLLM has one",
    ),
    *(
        Patch(
            target=f"vllm.v1.core.sched.scheduler.Scheduler.{name}",
            parameters=("self", "draft_token_ids", *more),
            function=grammars.learn_drafts,
            reason="vLLM asks one grammar after another, and each answer takes 0.1 ms",
            remove_when="the entries above are removed",
        )
        for name, more in (
            ("update_draft_token_ids", ()),
            ("update_draft_token_ids_in_output", ("scheduler_output",)),
        )
    ),
)

RESOURCES = "vllm.utils.cpu_resource_utils"
CONTAINERS = "vLLM knows the topmost cgroup's limit alone, and counts files in memory as used"
IN_WORKER: tuple[Entry, ...] = (
    IGNORE_CTRL_C(target="vllm.v1.executor.multiproc_executor.WorkerProc.worker_busy_loop"),
    Patch(
        target=f"{RESOURCES}.get_cgroup_memory_limit",
        parameters=(),
        function=cgroups.limit,
        reason=CONTAINERS,
        remove_when="vLLM reads /proc/self/cgroup",
    ),
    Patch(
        target=f"{RESOURCES}.get_cgroup_memory_usage",
        parameters=(),
        function=cgroups.usage,
        reason=CONTAINERS,
        remove_when="vLLM leaves out what memory.stat has of files",
    ),
)

SERVER = "vllm.entrypoints.launchers.api_server.entry"
IN_SERVER: tuple[Entry, ...] = (
    Patch(
        target=f"{SERVER}.build_and_serve",
        parameters=(
            *("engine_client", "listen_address", "sock", "args", "peer_loads", "uvicorn_kwargs"),
        ),
        function=exit_code.fail_with_the_engine,
        reason="a server whose engine has ended exits with 0 (vllm #48966); after SIGTERM it may "
        "wait for ever for a stream to end",
        remove_when="vLLM exits with another code, and gives connections a time to close",
    ),
    Patch(
        target="vllm.entrypoints.launchers.utils.server_utils.freeze_gc_heap",
        parameters=(),
        function=interrupts.thaw_at_exit,
        reason="a server ends with Triton's list of what it has leaked",
        remove_when="vLLM unfreezes what it froze for its server, as for its engine",
    ),
    Patch(
        target="vllm.entrypoints.serve.instrumentator.metrics.attach_router",
        parameters=("app",),
        function=metrics.serve_with_ours,
        reason="with several API servers, the default under data parallelism, GET /metrics shows "
        "only what prometheus_client's own metrics write to files",
        remove_when="vLLM lets a plugin add a collector",
    ),
)

REPAIRS: tuple[Entry, ...] = (
    Override(
        target="vllm.v1.sample.sampler.Sampler.gather_specific_token_logprobs",
        parameters=("self", "logprobs", "logprob_token_ids", "sampled"),
        file="repairs/logprobs.py",
        reason="a request for the log-probabilities of chosen tokens replaces the likeliest tokens "
        "of all other requests of its step",
        remove_when="vLLM gathers both (`compat`)",
    ),
    Override(
        target="vllm.v1.worker.gpu_input_batch.InputBatch.generators",
        file="repairs/seeded_prompts.py",
        reason="vLLM samples for unfinished prompts and rewinds their generator by an offset, "
        "which a CPU generator lacks: a seeded prompt in two chunks would end the engine",
        remove_when="vLLM asks a generator for no offset (`compat`)",
    ),
    Override(
        target="vllm.config.cache.CacheConfig.user_specified_block_size",
        file="repairs/block_size.py",
        reason="a CPU's engine process completes its configuration again after its workers have "
        "laid out the cache, and resets a default block size to 128: prompts' chunks would end "
        "inside blocks, and pages be cached for the wrong prefix",
        remove_when="vLLM no longer resets the block size (`compat`)",
    ),
)

TABLE: tuple[Entry, ...] = (
    *(*FILES, *ROPE, *WITH_OURS, *ELSEWHERE, *ON_GPU, *WITH_DRAFTS, *PAGE_COPIES, *EXCHANGES),
    *(*GRAPHS, *HANDOVER, *OVERRIDES, *WITH_LORA, *REQUESTS, *AT_START, *IN_ENGINE, *IN_WORKER),
    *(*GRAMMARS, *IN_SERVER, *REPAIRS),
)


def host() -> Host:
    """The installed vLLM; raises HostVersionError unless it is a tested version."""
    return Host("vLLM", check_host("vllm"))


@cache
def apply(
    entries: tuple[Entry, ...], put: Callable[[Sequence[Function]], None] = patching.wrap
) -> None:
    """Check and apply a group, once in a process."""
    patching.apply(entries, host(), put)


def provide_page_copies() -> None:
    """Register our page copies where vLLM has none."""
    if page_copy.needed():
        apply(PAGE_COPIES, _register_kernels)


def complete_cpu() -> None:
    """Let a CPU's ranks exchange tokens of shared experts; compile and read graphs faster."""
    if current_platform.is_cpu():
        apply(EXCHANGES)
        apply(GRAPHS)


def hand_over_pages(vllm_config: VllmConfig) -> None:
    """Let vLLM's NIXL connector copy our pages, in workers and in their scheduler's process."""
    if hands_over(vllm_config):
        apply(HANDOVER)


def refuse_unused_adapters() -> None:
    """Make an adapter that would be used only in part an error."""
    apply(WITH_LORA)


def _register_kernels(kernels: Sequence[Function]) -> None:
    """Register them in vLLM's kernel registry, which replaces them for all importers."""
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({entry.target: entry.function for entry in kernels})
