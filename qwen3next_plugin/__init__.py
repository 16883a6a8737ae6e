"""Qwen3-Next for vLLM and SGLang: model, linear-attention state and MTP drafter, as a plugin."""

import sys
from pathlib import Path

__version__ = "0.1.0"


class _NotInstalled:
    """Asked last for a module: where these are sources, an install's modules are not among them."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Nothing; raises ModuleNotFoundError for what only an install has."""
        if name in (f"{__name__}.kernels", f"{__name__}.mtp"):
            raise ModuleNotFoundError(
                f"qwen3next_plugin is imported from {Path(__file__).parents[1]}, whose sources "
                f"lack the compiled kernels: start in another folder, or install it by `pip "
                f"install -e .`"
            )


sys.meta_path.append(_NotInstalled)


def register_vllm() -> None:
    """Entry point `vllm.general_plugins`: teach this process's vLLM our Qwen3-Next. Idempotent."""
    from qwen3next_plugin.engines.vllm.plugin import register

    register()


def register_sglang() -> None:
    """Entry point `sglang.srt.plugins`: teach this process's SGLang our Qwen3-Next. Idempotent."""
    from qwen3next_plugin.engines.sglang.plugin import register

    register()


def register_transformers() -> None:
    """Let transformers' `AutoModelForCausalLM` keep the MTP head and draft with it. Idempotent."""
    from qwen3next_plugin.engines.transformers.plugin import register

    register()


def sglang_platform() -> str | None:
    """Entry point `sglang.srt.platforms`: where there is no GPU, the class that sets defaults."""
    from qwen3next_plugin.engines.sglang.plugin import activate

    return activate()
