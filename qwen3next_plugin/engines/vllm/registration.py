"""Registration: what the vLLM entry point does in every process, once."""

import functools
import logging

from qwen3next_plugin import __version__, env
from qwen3next_plugin.versions import check_host

PACKAGE = "qwen3next_plugin.engines.vllm"
MODELS = {
    "Qwen3NextForCausalLM": f"{PACKAGE}.model:Qwen3NextForCausalLM",
    "Qwen3NextMTP": f"{PACKAGE}.mtp:Qwen3NextMTP",
}

logger = logging.getLogger("vllm.qwen3next_plugin")  # vLLM formats and levels what is below its own


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
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import register_backend

    version = check_host("vllm")
    if not current_platform.is_cpu():
        logger.info(
            "qwen3next_plugin %s has no kernels for %s yet: vLLM %s keeps its own Qwen3-Next",
            __version__,
            current_platform.device_name,
            version,
        )
        return
    from qwen3next_plugin.kernels.dispatch import describe

    for architecture, path in MODELS.items():
        ModelRegistry.register_model(architecture, path)
    register_backend("QWEN3NEXT_GDN", f"{PACKAGE}.backend.GatedDeltaNetBackend", is_mamba=True)
    logger.info(
        "qwen3next_plugin %s serves %s on vLLM %s with %s kernels",
        __version__,
        " and ".join(MODELS),
        version,
        describe("cpu"),
    )
