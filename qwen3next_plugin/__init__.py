"""Qwen3-Next for vLLM and SGLang: model, linear-attention state and MTP drafter, as a plugin."""

__version__ = "0.1.0"


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
