"""Registration with SGLang: what its entry points do in every process, once."""

import functools
import os

from qwen3next_plugin import env
from qwen3next_plugin.engines.sglang.cpu.environment import on_gpu, use_cpu, without_gpu
from qwen3next_plugin.engines.sglang.names import ARCHITECTURES, MODEL_PACKAGE, PLATFORM, logger
from qwen3next_plugin.versions import check_host


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: our CPU platform where SGLang runs on a CPU."""
    if env.disabled():
        return None
    from qwen3next_plugin.engines.sglang import caches

    caches.provide_folder()  # before PyTorch uses one
    return PLATFORM if without_gpu() else None


@functools.cache
def register() -> bool:
    """Register models, backend and patches; if that fails, stop the process with our error.

    SGLang would log an exception and serve its built-in model. So a failure raises SystemExit,
    unless QWEN3NEXT_OPTIONAL=1.
    Returns whether our model serves.
    """
    try:
        env.check()
        return not env.disabled() and _register()
    except Exception as error:
        if not env.optional():
            raise SystemExit(f"qwen3next_plugin cannot be used: {error}") from error
        logger.exception("qwen3next_plugin is not used; SGLang keeps its own Qwen3-Next")
        return False


def _register() -> bool:
    check_host("sglang")
    on_cpu = without_gpu()
    if on_cpu:
        _prepare_cpu()  # before SGLang's modules are imported
    from qwen3next_plugin.engines.sglang.patches import When, apply

    if not (on_cpu or on_gpu()):
        apply(When.REGISTERED, When.NO_KERNELS)
        return False
    apply(When.REGISTERED, When.WITH_OURS, When.ON_CPU if on_cpu else When.ON_GPU)
    if on_cpu:
        from qwen3next_plugin.engines.sglang.cpu.attention_backend import register_attention_backend

        register_attention_backend()
    _register_models()
    return True


def _prepare_cpu() -> None:
    use_cpu()
    if env.kernels() != "reference":
        from qwen3next_plugin.kernels import native

        native.load()  # fails now if the build is broken or the instruction set is missing
    _check_platform()


def _check_platform() -> None:
    """Raise unless our platform is active: SGLang would only log that it cannot load it."""
    from sglang.srt.platforms import current_platform

    kind = type(current_platform)
    if f"{kind.__module__}:{kind.__name__}" != PLATFORM:
        raise RuntimeError(
            f"SGLang runs on {kind.__name__}, not on the plugin's platform; "
            f"leave SGLANG_PLATFORM out, or set it to qwen3next_cpu"
        )


def _register_models() -> None:
    """Use SGLang's variable for external models, so that SGLang does not import its own."""
    if os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", MODEL_PACKAGE) != MODEL_PACKAGE:
        from sglang.srt.models.registry import ModelRegistry

        ModelRegistry.register(MODEL_PACKAGE, overwrite=True, strict=True)


def registered() -> dict[str, str]:
    """SGLang's platform and the module of each architecture, once its plugins are loaded."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.platforms import current_platform

    known = ModelRegistry.models  # Qwen4-Exp only if this plugin serves
    modules = {name: known[name].__module__ for name in ARCHITECTURES if name in known}
    return {"platform": current_platform.device_type} | modules
