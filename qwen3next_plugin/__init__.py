"""Qwen3-Next for vLLM: architecture, linear-attention state and MTP drafter, as a plugin."""

__version__ = "0.1.0"


def register_vllm() -> None:
    """Entry point `vllm.general_plugins`: teach this process's vLLM our Qwen3-Next. Idempotent."""
    from qwen3next_plugin.engines.vllm.registration import register

    register()
