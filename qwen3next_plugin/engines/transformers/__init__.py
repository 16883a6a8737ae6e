"""transformers: importing this registers the family's models with their MTP head."""

from qwen3next_plugin.engines.transformers.plugin import register

register()
