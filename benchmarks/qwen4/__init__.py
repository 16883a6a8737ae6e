"""Qwen3.8-Flash-Next: its models, and what is measured of the parts that only it has."""
