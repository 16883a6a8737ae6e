"""Registration with transformers' Auto classes."""

import functools
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.versions import check_host


@override(
    "transformers.models.auto.modeling_auto.AutoModelForCausalLM._model_mapping",
    reason="`AutoModelForCausalLM.register` refuses a text model for a wrapper's config, and "
    "before 5.19 the mapping's own `register` ignores configs of transformers",
    remove_when="`AutoModelForCausalLM.register` takes it",
)
@functools.cache
def register() -> None:
    """Let `AutoModelForCausalLM` load the family with its MTP head. Idempotent.

    Raises:
        EnvError, HostVersionError: a QWEN3NEXT_* variable, or transformers' version.
    """
    env.check()
    if env.disabled():
        return
    check_host("transformers")
    if env.kernels() != "reference":
        from qwen3next_plugin.kernels import native

        native.load()  # fails now if the build is broken or the instruction set is missing
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    for model_type, model in models().items():
        # Not `AutoModelForCausalLM.register`: it rejects a text model for a wrapper's config. Nor
        # this mapping's: before 5.19 it rejects a class for one of the host's own configs.
        AutoModelForCausalLM._model_mapping._extra_content[CONFIG_MAPPING[model_type]] = model


def models() -> dict[str, Any]:
    """Our classes by model_type, those of extras too."""
    from qwen3next_plugin.engines.transformers.model import trunk

    found: dict[str, Any] = {**trunk.MODELS}
    for models in extras.models("transformers"):
        found |= {name: extras.load_class(path) for name, path in models.trunks.items()}
    return found
