"""vLLM: the only code that imports vllm."""
