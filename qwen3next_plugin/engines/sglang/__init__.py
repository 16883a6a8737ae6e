"""Qwen3-Next in SGLang: the only code that imports sglang."""
