"""Fixes of SGLang for any model: skip them when you read how ours is served."""
