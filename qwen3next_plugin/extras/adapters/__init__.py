"""LoRA adapters under SGLang on CPUs. vLLM serves them itself."""
