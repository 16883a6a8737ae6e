"""The layers, as SGLang builds, loads and shards them."""
