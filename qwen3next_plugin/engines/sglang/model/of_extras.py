"""The models of extras: SGLang looks for classes in this folder."""

from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.sglang.names import OF_EXTRAS

EntryClass = [
    extras.load_class(path)
    for models in OF_EXTRAS
    for path in (*models.trunks.values(), *models.drafters.values())
]
