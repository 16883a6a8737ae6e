"""vLLM's models with a vision tower, with our text model inside."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen3_5 as host
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.model.moe import describe_experts
from qwen3next_plugin.engines.vllm.model.trunk import Qwen3_5ForCausalLM
from qwen3next_plugin.model.checkpoint.layouts import (
    Shapes,
    check_tower,
    tower_shapes,
    without_prefix,
)

TOWER = "visual."  # prefix of its parameters' names

# An adapter trained on the text model alone has no `language_model` in its names.
ADAPTERS_OF_TEXT = WeightsMapper(
    orig_to_new_prefix={"model.layers.": "language_model.model.layers."}
)


@override(
    "vllm.model_executor.models.qwen3_5.Qwen3_5ForCausalLM",
    reason="vLLM's vision-language model offers no other way to replace its text model",
    remove_when="it takes the text model's class from vLLM's registry",
)
@contextmanager
def _our_text_model(name: str) -> Iterator[None]:
    """Within this context vLLM's wrapper builds our text model, which it finds by this name."""
    theirs = getattr(host, name)
    setattr(host, name, Qwen3_5ForCausalLM)
    try:
        yield
    finally:
        setattr(host, name, theirs)


class OurTextModel:
    """Mixin for vLLM's vision-language models that contain our text model."""

    language_model: Qwen3_5ForCausalLM
    named_parameters: Callable[[], Iterator[tuple[str, torch.nn.Parameter]]]  # nn.Module's
    hf_to_vllm_mapper = host.Qwen3_5ForConditionalGeneration.hf_to_vllm_mapper | ADAPTERS_OF_TEXT
    get_mamba_state_shape_from_config = Qwen3_5ForCausalLM.get_mamba_state_shape_from_config
    get_mamba_state_dtype_from_config = Qwen3_5ForCausalLM.get_mamba_state_dtype_from_config
    get_mamba_state_copy_func = Qwen3_5ForCausalLM.get_mamba_state_copy_func
    get_model_state_cls = staticmethod(Qwen3_5ForCausalLM.get_model_state_cls)
    packed_modules_mapping = Qwen3_5ForCausalLM.packed_modules_mapping
    fall_back_to_pt_during_load = False  # safetensors only: nothing is unpickled

    tower: Shapes  # of the tensors that a vision tower was loaded from, if there is one

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load text model and vision tower.

        Raises:
            CheckpointError: names a tensor that is missing. vLLM would serve what memory held.
        """
        tower: list[tuple[str, torch.Tensor]] = []

        def text() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if without_prefix(name, self.language_model.config) is None:
                    tower.append((name, tensor))
                else:
                    yield name, tensor

        loaded = {f"language_model.{name}" for name in self.language_model.load_weights(text())}
        loader = AutoWeightsLoader(self)
        loaded |= loader.load_weights(tower, mapper=self.hf_to_vllm_mapper)
        wanted = {name for name, _ in self.named_parameters() if name.startswith(TOWER)}
        check_tower(wanted - loaded)
        self.tower = tower_shapes(tower) if wanted else {}
        return loaded


class Qwen3_5ForConditionalGeneration(  # noqa: N801, vLLM's drafter knows it by this name
    OurTextModel, host.Qwen3_5ForConditionalGeneration
):
    """Dense."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        with _our_text_model("Qwen3_5ForCausalLM"):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class Qwen3_5MoeForConditionalGeneration(  # noqa: N801, as above
    OurTextModel, host.Qwen3_5MoeForConditionalGeneration
):
    """With experts."""

    moe_layers: list[Any]
    update_physical_experts_metadata = Qwen3_5ForCausalLM.update_physical_experts_metadata

    @override(
        "vllm.model_executor.models.qwen3_5.Qwen3_5MoeForCausalLM",
        reason="vLLM's vision-language model offers no other way to replace its text model",
        remove_when="it takes the text model's class from vLLM's registry",
    )
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        with _our_text_model("Qwen3_5MoeForCausalLM"):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def set_moe_parameters(self) -> None:
        """Called by vLLM once the text model is built."""
        describe_experts(self, self.language_model.model.layers)
