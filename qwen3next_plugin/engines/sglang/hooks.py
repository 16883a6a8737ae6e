"""Functions that replace SGLang's own.

SGLang's modules are imported inside: patches are
registered before SGLang has chosen its device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3next_plugin import __version__, env
from qwen3next_plugin.engines.hub import local_folder
from qwen3next_plugin.engines.sglang import flags
from qwen3next_plugin.engines.sglang.config import quantization_config, read_config
from qwen3next_plugin.engines.sglang.cpu.environment import on_gpu
from qwen3next_plugin.engines.sglang.names import OF_EXTRAS, is_ours, logger, serves_ours
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.model.quantisation.files import leave_plain
from qwen3next_plugin.model.quantisation.in_panels import is_packed
from qwen3next_plugin.versions import check_host


@patch(
    When.WITH_OURS,
    "sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool._init_mamba_pool",
    reason="our pool copies whole pages",
    remove_when="a config can name its pool's class",
)
def make_page_pool(host: Callable[..., None], pool: Any, *args: Any, **kwargs: Any) -> None:
    """Use our pool class for pages."""
    from qwen3next_plugin.engines.sglang.state.pages import PageParams, PagePool

    if isinstance(kwargs["cache_params"], PageParams):
        pool.mamba_pool_cls = PagePool
    host(pool, *args, **kwargs)


@patch(
    When.WITH_OURS,
    "sglang.srt.mem_cache.kv_cache_configurator._pd_prefill_skips_mamba_spec_state",
    reason="SGLang reserves a state per draft; our page can roll back by itself",
    remove_when="a config can say that it needs none",
)
def skip_snapshots(host: Callable[[], bool]) -> bool:
    """Whether SGLang skips its states for drafts: always for our model."""
    return serves_ours() or host()


@patch(
    When.ON_CPU,
    "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
    reason="SGLang pads head counts and widths for its AMX kernels; ours take any, and our "
    "checks compare a checkpoint with its own config. An extra may keep more beside KV",
    remove_when="SGLang pads for its AMX kernels only, and asks a model what KV has room for",
)
def set_sizes(host: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Leave our model's sizes as they are, but for what an extra keeps beside keys and values."""
    if not is_ours(model_config):
        return host(model_config, load_config, tp_size)
    config = read_config(model_config.hf_config, tp_size)
    if more := sum(models.kv_elements(config) for models in OF_EXTRAS):
        model_config.head_dim = model_config.v_head_dim = config.head_dim + more // 2
    return model_config


@patch(
    When.WITH_OURS,
    "sglang.srt.layers.attention.attention_registry.attn_backend_wrapper",
    reason="SGLang chooses the linear-attention backend of built-in models itself",
    remove_when="a registered backend can serve a built-in architecture",
)
def wrap_backend(host: Callable[..., Any], runner: Any, full_attn_backend: Any) -> Any:
    """Combine our linear-attention backend with the attention backend that was chosen."""
    if not is_ours(runner.model_config):
        return host(runner, full_attn_backend)
    if runner.is_draft_worker:  # one layer of full attention
        return full_attn_backend
    layers = runner.model_config.hf_text_config.full_attention_layer_ids
    if on_gpu():
        from qwen3next_plugin.engines.sglang.state.device_steps import (
            DeviceGatedDeltaNetBackend,
            DeviceHybridBackend,
        )

        backend = DeviceGatedDeltaNetBackend(runner)
        return DeviceHybridBackend(full_attn_backend, backend, layers)
    from qwen3next_plugin.engines.sglang.state.steps import GatedDeltaNetBackend, HybridBackend

    return HybridBackend(full_attn_backend, GatedDeltaNetBackend(runner), layers)


@patch(
    When.ON_CPU,
    "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
    reason="seeds need --enable-deterministic-inference, for which SGLang replaces products by "
    "Triton kernels, and ends without a GPU",
    remove_when="SGLang has seeds on a CPU",
)
@patch(
    When.ON_CPU,
    "sglang.srt.model_executor.model_runner.ModelRunner.check_quantized_moe_compatibility",
    reason="SGLang refuses experts that its FP8 blocks do not divide; our kernels take them",
    remove_when="SGLang asks the quantisation whether it can split experts so",
)
def skip_for_ours(host: Callable[..., None], runner: Any) -> None:
    """Leave our model as it is."""
    if not is_ours(runner.model_config):
        host(runner)


@patch(
    When.ON_CPU,
    "sglang.srt.model_loader.loader._get_quantization_config",
    reason="SGLang's kernels for quantised weights run on GPUs, or with AMX at best; and it "
    "reads formats from config.json, which does not name all unquantised modules",
    remove_when="SGLang lets a plugin bring a quantisation for a model",
)
def choose_quantisation(host: Callable[..., Any], model_config: Any, load_config: Any) -> Any:
    """Use our kernels for a quantised checkpoint of our models."""
    from qwen3next_plugin.engines.sglang.cpu.quantisation import Quantisation

    quantised = quantization_config(model_config.hf_config) is not None or env.quantise()
    if not is_ours(model_config) or not quantised:
        return host(model_config, load_config)
    return Quantisation(_folder(model_config, load_config), model_config.hf_config)


@patch(
    When.ON_CPU,
    "sglang.srt.configs.model_config.ModelConfig._verify_quantization",
    reason="SGLang refuses the quant_method of checkpoints that `qwen3next pack` wrote",
    remove_when="SGLang lets a plugin bring a quantisation for a model",
)
def accept_packed(host: Callable[[Any], None], model_config: Any) -> None:
    """Skip a check by config.json of our model's packed checkpoint."""
    if not (is_ours(model_config) and is_packed(quantization_config(model_config.hf_config))):
        host(model_config)


@patch(
    When.ON_GPU,
    "sglang.srt.model_loader.loader._get_quantization_config",
    reason="SGLang reads formats from config.json, which does not name all unquantised modules",
    remove_when="SGLang reads formats from the files",
)
def leave_plain_modules(host: Callable[..., Any], model_config: Any, load_config: Any) -> Any:
    """Make SGLang's quantisation skip the modules that the checkpoint's files have unquantised."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from qwen3next_plugin.model.quantisation.files import read_plain_modules

    found = host(model_config, load_config)
    of_files = quantization_config(model_config.hf_config) is not None
    if found is None or not (of_files and is_ours(model_config)):
        return found
    plain = read_plain_modules(_folder(model_config, load_config), model_config.hf_config)
    return leave_plain(found, plain, LinearBase, UnquantizedLinearMethod)


def _folder(model_config: Any, load_config: Any) -> Path:
    """Where the checkpoint is."""
    return local_folder(model_config.model_path, model_config.revision, load_config.download_dir)


@patch(
    When.ON_CPU,
    "sglang.srt.speculative.spec_utils.commit_mamba_states_after_verify",
    reason="SGLang computes which states of a chain to keep; a page keeps all",
    remove_when="SGLang asks the backend whether there is something to commit",
)
def commit_trees(
    host: Callable[..., None], target_worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> None:
    """Commit states of trees, and snapshots; a chain's page can roll back by itself."""
    ours = is_ours(target_worker.model_runner.model_config)
    if not (ours and batch.spec_info.tree_topk == 1 and batch.mamba_track_indices is None):
        host(target_worker, batch, *args, **kwargs)


@patch(
    When.ON_CPU,
    "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker",
    reason="each request needs its own draft length",
    remove_when="SGLang asks an in-tree platform for its worker",
)
def choose_worker(host: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
    """Use our worker for chains of drafts from the checkpoint's MTP head."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    given = resolving_view(server_args)
    chain = algorithm.is_eagle() and given.speculative_eagle_topk == 1
    if not (chain and is_ours(model_config_of(server_args))):
        return host(algorithm, server_args)
    from qwen3next_plugin.engines.sglang.speculation.worker import Worker

    return Worker


@patch(
    When.ON_GPU,
    "sglang.srt.speculative.adaptive_runtime_state.AdaptiveController.__init__",
    reason="SGLang's policy does not know what a step costs",
    remove_when="SGLang asks a plugin for the policy",
)
def choose_policy(host: Callable[..., None], controller: Any, worker: Any, policy: Any) -> None:
    """Choose the number of drafts by our policy, among SGLang's candidates."""
    runner = worker.target_worker.model_runner
    if is_ours(runner.model_config):
        from qwen3next_plugin.engines.sglang.speculation.one_length import OneLength

        policy = OneLength(policy.candidate_steps)
    host(controller, worker, policy)


@patch(
    When.ON_CPU,
    "sglang.srt.layers.sampler.Sampler.__init__",
    reason="at a temperature SGLang takes logarithms of rounded probabilities; only "
    "--enable-deterministic-inference, which gives all requests one seed, changes that",
    remove_when="SGLang takes log_softmax of logits without that flag",
)
def use_log_softmax(host: Callable[[Any], None], sampler: Any) -> None:
    """Compute a sampled token's log-probability as a prompt token's if bits must not depend on it.

    `enable_deterministic` is SGLang's name for that; the flag of this name changes seeds, too.
    """
    host(sampler)
    if env.batch_invariant():
        sampler.enable_deterministic = True


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.init_metrics_reporter",
    reason="SGLang's reporter knows neither draft lengths nor state pages",
    remove_when="the reporter's class can be given",
)
def choose_reporter(host: Callable[[Any], None], scheduler: Any) -> None:
    """Report metrics of steps, and of MTP where our worker drafts."""
    from qwen3next_plugin.engines.sglang.metrics import MetricsReporter
    from qwen3next_plugin.engines.sglang.speculation.worker import Worker
    from qwen3next_plugin.mtp.metrics import Board

    host(scheduler)
    drafts = isinstance(scheduler.draft_worker, Worker)
    if drafts or scheduler.spec_algorithm.is_none():
        # SGLang creates its own class, which becomes ours; `begin` adds the fields.
        scheduler.metrics_reporter.__class__ = MetricsReporter
        loop = scheduler.draft_worker.drafter.loop if drafts else None
        scheduler.metrics_reporter.begin(loop.observer.board if loop else Board(0), loop)


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.update_running_batch",
    reason="a step without drafts must cost what it costs without NEXTN; SGLang prepares every "
    "step for drafts",
    remove_when="SGLang runs steps without drafts as without NEXTN",
)
def choose_step(host: Callable[..., Any], scheduler: Any, batch: Any) -> Any:
    """Ask our worker whether the next decode step has drafts to verify."""
    from qwen3next_plugin.engines.sglang.speculation.worker import Worker

    if isinstance(scheduler.draft_worker, Worker):
        scheduler.draft_worker.choose_step(batch)
    return host(scheduler, batch)


@patch(
    When.ON_GPU,
    "sglang.srt.arg_groups.platform_hook.handle_platform_defaults",
    reason="flags must be checked before a process starts; on GPUs SGLang asks its own "
    "platforms, and no plugin",
    remove_when="a plugin can check flags on a GPU",
)
def check_on_gpu(host: Callable[..., None], server_args: Any) -> None:
    """Refuse what cannot be served, fill in a default, and log what serves.

    SGLang calls this once, in the process that starts the others. On a CPU, our platform does it.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    host(server_args)
    if is_ours(model_config := model_config_of(server_args)):
        flags.check(resolving_view(server_args), model_config, on_cpu=False)
        flags.complete_on_gpu(server_args)
        logger.info(
            "qwen3next_plugin %s serves this model on SGLang %s, with %s kernels",
            *(__version__, check_host("sglang"), described("cuda")),
        )


@patch(
    When.NO_KERNELS,
    "sglang.srt.arg_groups.platform_hook.handle_platform_defaults",
    reason="the log must say that SGLang's own model serves",
    remove_when="there are kernels for every platform",
)
def say_no_kernels(host: Callable[..., None], server_args: Any) -> None:
    """Log that SGLang's own model serves on this device."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    if is_ours(model_config_of(server_args)):
        logger.info(
            "qwen3next_plugin %s has no kernels for %s yet: SGLang %s keeps its own Qwen3-Next",
            *(__version__, resolving_view(server_args).device, check_host("sglang")),
        )
    host(server_args)
