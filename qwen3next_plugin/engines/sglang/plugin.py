"""Registration: what the SGLang entry point does in every process, once."""

import functools
import os
from collections.abc import Sequence

from qwen3next_plugin import env
from qwen3next_plugin.engines.patching import Hook
from qwen3next_plugin.engines.sglang.cpu.environment import on_gpu, use_cpu, without_gpu
from qwen3next_plugin.engines.sglang.names import ARCHITECTURES, MODELS, PLATFORM, logger
from qwen3next_plugin.versions import check_host


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: our CPU platform where SGLang runs on a CPU."""
    return PLATFORM if without_gpu() and not env.disabled() else None


@functools.cache
def register() -> bool:
    """Register models and hooks; whether our model serves. On failure stop the process.

    SGLang logs an exception of a plugin and goes on with its built-in model, which is never what a
    user who installed this one wants. So a failure is a SystemExit, unless QWEN3NEXT_OPTIONAL=1.
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
    version = check_host("sglang")
    from qwen3next_plugin.engines import patching as seams

    if without_gpu():
        _prepare_cpu()
        from qwen3next_plugin.engines.sglang.cpu.attention_backend import register_attention_backend
        from qwen3next_plugin.engines.sglang.patches import ANYWHERE, ON_CPU, WITH_OURS

        seams.put((*ANYWHERE, *WITH_OURS, *ON_CPU), version, _apply)
        register_attention_backend()
    elif on_gpu():
        from qwen3next_plugin.engines.sglang.patches import ANYWHERE, ON_GPU, WITH_OURS

        seams.put((*ANYWHERE, *WITH_OURS, *ON_GPU), version, _apply)
    else:
        from qwen3next_plugin.engines.sglang.patches import ANYWHERE, ELSEWHERE

        seams.put((*ANYWHERE, *ELSEWHERE), version, _apply)
        return False
    _register_models()
    return True


def _apply(hooks: Sequence[Hook]) -> None:
    """Through SGLang's own registry."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, hook.around, HookType.AROUND)
    HookRegistry.apply_hooks()


def _prepare_cpu() -> None:
    use_cpu()
    if env.kernels() != "reference":
        from qwen3next_plugin.kernels import native

        native.load()  # a broken build, or an instruction set that is not there, shows now
    _check_platform()


def _check_platform() -> None:
    """SGLang only logs a platform that it cannot load, and ours is what refuses and chooses."""
    from sglang.srt.platforms import current_platform

    kind = type(current_platform)
    if f"{kind.__module__}:{kind.__name__}" != PLATFORM:
        raise RuntimeError(
            f"SGLang runs on {kind.__name__}, not on the plugin's platform; "
            f"leave SGLANG_PLATFORM out, or set it to qwen3next_cpu"
        )


def _register_models() -> None:
    """Through the variable for external models, which also spares SGLang importing its own."""
    if os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", MODELS) != MODELS:
        from sglang.srt.models.registry import ModelRegistry

        ModelRegistry.register(MODELS, overwrite=True, strict=True)


def registered() -> dict[str, str]:
    """Let SGLang load its plugins; its platform, and the module that serves each architecture."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.platforms import current_platform

    modules = {name: ModelRegistry.models[name].__module__ for name in ARCHITECTURES}
    return {"platform": current_platform.device_type} | modules
