"""The layers, as vLLM builds, loads and shards them."""
