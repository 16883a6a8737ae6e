"""Registration: what the SGLang entry point does in every process, once."""

import functools
import logging
import os

from qwen3next_plugin import __version__, env
from qwen3next_plugin.versions import check_host

logger = logging.getLogger("sglang.qwen3next_plugin")
MODELS = "qwen3next_plugin.engines.sglang.models"


@functools.cache
def register() -> None:
    """Register models and hooks; on failure stop the process with our error.

    SGLang logs an exception of a plugin and goes on with its built-in model, which is never what a
    user who installed this one wants. So a failure is a SystemExit, unless QWEN3NEXT_OPTIONAL=1.
    """
    try:
        env.check()
        if not env.disabled():
            _register()
    except Exception as error:
        if not env.optional():
            raise SystemExit(f"qwen3next_plugin cannot be used: {error}") from error
        logger.exception("qwen3next_plugin is not used; SGLang keeps its own Qwen3-Next")


def _register() -> None:
    version = check_host("sglang")
    from qwen3next_plugin.engines.sglang import seams
    from qwen3next_plugin.engines.sglang.machine import use_cpu, without_gpu

    if not without_gpu():
        from qwen3next_plugin.engines.sglang.hooks import ANYWHERE

        seams.check(ANYWHERE, version)
        seams.apply(ANYWHERE)
        return
    kernel_package = use_cpu()
    if env.kernels() != "reference":
        from qwen3next_plugin.kernels import native

        native.load()  # a broken build, or an instruction set that is not there, shows now
    _register_models()
    from qwen3next_plugin.engines.sglang.attention_backend import register_attention_backend
    from qwen3next_plugin.engines.sglang.hooks import ANYWHERE, ON_CPU

    register_attention_backend()
    seams.check((*ANYWHERE, *ON_CPU), version)
    seams.apply((*ANYWHERE, *ON_CPU))
    logger.info(
        "qwen3next_plugin %s for SGLang %s, with %s kernels; %s",
        __version__,
        version,
        "slow reference" if env.kernels() == "reference" else f"native {native.isa()}",
        kernel_package,
    )


def _register_models() -> None:
    """Through the variable for external models, which also spares SGLang importing its own."""
    if os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", MODELS) != MODELS:
        from sglang.srt.models.registry import ModelRegistry

        ModelRegistry.register(MODELS, overwrite=True, strict=True)
