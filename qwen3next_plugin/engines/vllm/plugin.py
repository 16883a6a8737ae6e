"""Registration: what the vLLM entry point does in every process, once."""

import functools
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.engines.vllm.names import (
    ARCHITECTURES,
    BACKEND_NAME,
    DRAFTER,
    OPAQUE_OP,
    PACKAGE,
    TRUNK,
    logger,
)
from qwen3next_plugin.versions import check_host


@functools.cache
def register() -> None:
    """Register models and backend; on failure stop the process with our error.

    vLLM logs an exception of a plugin and goes on with its built-in model, which is never what a
    user who installed this one wants. So a failure is a SystemExit, unless QWEN3NEXT_OPTIONAL=1.
    """
    try:
        env.check()
        if not env.disabled():
            _register()
    except Exception as error:
        if not env.optional():
            raise SystemExit(f"qwen3next_plugin cannot be used: {error}") from error
        logger.exception("qwen3next_plugin is not used; vLLM keeps its own Qwen3-Next")


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import register_backend

    check_host("vllm")
    from qwen3next_plugin.engines.vllm.flags import NoKernels, Qwen3NextChecks

    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        MODELS_CONFIG_MAP[TRUNK] = NoKernels
        return
    if env.kernels() != "reference":
        from qwen3next_plugin.kernels import native

        native.load()  # a broken build, or an instruction set that is not there, shows now
    if not current_platform.is_cpu():
        _keep_out_of_graphs(OPAQUE_OP)
    MODELS_CONFIG_MAP[TRUNK] = Qwen3NextChecks
    ModelRegistry.register_model(TRUNK, f"{PACKAGE}.model.trunk:Qwen3NextForCausalLM")
    ModelRegistry.register_model(DRAFTER, f"{PACKAGE}.model.mtp:Qwen3NextMTP")
    register_backend(BACKEND_NAME, f"{PACKAGE}.state.steps.GatedDeltaNetBackend", is_mamba=True)


def _keep_out_of_graphs(op: str) -> None:
    """Let vLLM cut its compiled graphs at our op, as at those of its own recurrent layers.

    Which pages a step reads is known at the step only, so a piecewise CUDA graph must not hold it.
    vLLM 0.32 and 0.33 have no setting that adds to their list. Can go when an op can say it itself.
    """
    from vllm.config import CompilationConfig

    if op not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(op)


def registered() -> dict[str, str]:
    """Let vLLM load its plugins; its platform, and the module that serves each architecture."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    modules = {name: _module(ModelRegistry.models[name]) for name in ARCHITECTURES}
    return {"platform": current_platform.device_type} | modules


def _module(entry: Any) -> str:
    """Where a registered model lives: entries are lazy (a module's name) or hold the class."""
    return getattr(entry, "module_name", None) or getattr(entry, "model_cls", entry).__module__
