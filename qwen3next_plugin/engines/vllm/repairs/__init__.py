"""Fixes of vLLM for any model: skip them when you read how ours is served."""
