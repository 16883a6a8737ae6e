"""Registration with vLLM: what its entry point does in every process, once."""

import functools
import logging
import sys
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.engines.vllm.names import (
    BACKEND_NAME,
    ENGINE,
    LOGGER,
    PACKAGE,
    models_here,
)
from qwen3next_plugin.versions import check_host

logger = logging.getLogger(LOGGER)


@functools.cache
def register() -> None:
    """Register models, backend and patches; if that fails, stop the process with our error.

    vLLM would log an exception and serve its built-in model. So a failure raises SystemExit, unless
    QWEN3NEXT_OPTIONAL=1.
    """
    try:
        env.check()
        if not env.disabled():
            _register()
    except Exception as error:
        if not env.optional():
            raise SystemExit(f"qwen3next_plugin cannot be used: {error}") from error
        logger.exception("qwen3next_plugin is not used; vLLM keeps its own models")


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import register_backend

    check_host("vllm")
    from qwen3next_plugin.engines.vllm import caches
    from qwen3next_plugin.engines.vllm.patches import When, apply

    caches.provide_folder()
    on_cpu = current_platform.is_cpu()
    if not (on_cpu or current_platform.is_cuda_alike()):
        apply(When.NO_KERNELS)
        return
    if env.kernels() != "reference":
        from qwen3next_plugin.kernels import native

        native.load()  # fails now if the build is broken or the instruction set is missing
    if on_cpu:
        import qwen3next_plugin.engines.vllm.cpu.quantisation  # noqa: F401, registers itself

        if ENGINE in sys.modules:  # this is an engine's own process
            apply(When.IN_ENGINE)
    if ENGINE in sys.modules:
        apply(When.GRAMMARS)
    apply(When.REGISTERED)
    if not on_cpu:
        apply(When.ON_GPU)
    for architecture, model in models_here().items():
        ModelRegistry.register_model(architecture, model)
    register_backend(BACKEND_NAME, f"{PACKAGE}.state.steps.GatedDeltaNetBackend", is_mamba=True)


def registered() -> dict[str, str]:
    """vLLM's platform and the module of each architecture, once its plugins are loaded."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    modules = {name: _module(ModelRegistry.models[name]) for name in models_here()}
    return {"platform": current_platform.device_type} | modules


def _module(entry: Any) -> str:
    """The module of a registered model; an entry holds the module's name (lazy) or the class."""
    return getattr(entry, "module_name", None) or getattr(entry, "model_cls", entry).__module__
