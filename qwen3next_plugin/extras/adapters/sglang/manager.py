"""LoRA adapters on a CPU: SGLang's manager, without its pool and its layers.

SGLang copies adapters into GPU buffers, in layers that pin memory, and ignores tensors that do not
fit. On a CPU an adapter's weights are used where they are: each projection runs as without
adapters, packed or quantised, and a hook adds the output of the adapters of the step's rows.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.lora import layers
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.lora.utils import generate_sequence_lengths
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_lora, get_parallel
from torch import nn

from qwen3next_plugin.engines.hub import local_folder
from qwen3next_plugin.engines.sglang.cpu.quantisation import make_product
from qwen3next_plugin.engines.sglang.names import LORA_BACKEND
from qwen3next_plugin.engines.sglang.speculation.verify_input import RaggedVerifyInput
from qwen3next_plugin.extras.adapters.low_rank import LowRank, read, stored

# How SGLang splits an adapter among ranks, by the layer's class.
SPLIT = {
    ColumnParallelLinear: layers.ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinear: layers.MergedColumnParallelLinearWithLoRA,
    QKVParallelLinear: layers.QKVParallelLinearWithLoRA,
    RowParallelLinear: layers.RowParallelLinearWithLoRA,
}


class Adapters(LoRAManager):
    """The adapters of one model, and which rows of the running step have which."""

    def __init__(self, runner: Any) -> None:
        self.rows: dict[str, torch.Tensor] = {}  # adapter → rows of the step
        given = get_lora()
        super().__init__(
            base_model=runner.model,
            base_hf_config=runner.model_config.hf_config,
            max_loras_per_batch=given.max_loras_per_batch,
            load_config=runner.load_config,
            dtype=runner.dtype,
            server_args=runner.server_args,
            lora_backend=LORA_BACKEND,
            max_lora_rank=given.max_lora_rank,
            target_modules=given.lora_target_modules,
            lora_paths=given.lora_paths,
        )

    def init_state(
        self,
        max_lora_rank: int | None = None,
        target_modules: Iterable[str] | None = None,
        lora_paths: list[LoRARef] | None = None,
    ) -> None:
        """Watch the projections, and load the adapters that the flags name."""
        self.memory_pool = _NoPool(self.max_loras_per_batch, max_lora_rank)
        self.projections: dict[str, Any] = {  # Any: SGLang's layers are not typed
            name: layer for name, layer in self.base_model.named_modules() if type(layer) in SPLIT
        }
        for name, layer in self.projections.items():
            layer.register_forward_hook(self._hook(name))
        self.init_lora_adapters(lora_paths)

    def load_lora_weights(self, lora_ref: LoRARef) -> None:
        """Load an adapter's file; SGLang answers with what this raises."""
        folder = local_folder(lora_ref.lora_path, None)
        self._load(lora_ref, stored(folder))

    def load_lora_weights_from_tensors(
        self, lora_ref: LoRARef, tensors: dict[str, torch.Tensor]
    ) -> None:
        self._load(lora_ref, tensors.items())

    def _load(self, lora_ref: LoRARef, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        settings = self.configs[lora_ref.lora_id].hf_config
        adapter = read(tensors, settings, self.base_model.config)
        self.loras[lora_ref.lora_id] = {
            name: Addition(self.projections[name], low_rank, self.dtype)
            for name, low_rank in adapter.items()
        }

    def fetch_new_loras(self, *_: Any) -> None:
        """Nothing: there is no pool to copy adapters to."""

    def prepare_lora_batch(self, forward_batch: ForwardBatch) -> None:
        """Note the rows of each adapter in the step. SGLang calls this before each one."""
        spec_info, ids = forward_batch.spec_info, forward_batch.lora_ids
        verifies = forward_batch.forward_mode.is_target_verify()
        if verifies and isinstance(spec_info, RaggedVerifyInput):
            lengths = torch.tensor(spec_info.widths)
        else:
            lengths = generate_sequence_lengths(forward_batch, device=torch.device("cpu"))
        adapters = sorted(set(ids) - {None})  # in the same order on every rank
        places = [None, *adapters]
        of_row = torch.tensor([places.index(one) for one in ids]).repeat_interleave(lengths)
        self.rows = {
            one: (of_row == i).nonzero().squeeze(1) for i, one in enumerate(adapters, start=1)
        }

    def reset_lora_batch(self) -> None:
        self.rows = {}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor], Any], None]:
        def add(layer: nn.Module, inputs: tuple[torch.Tensor], output: Any) -> None:
            for one, rows in self.rows.items():
                if (addition := self.loras[one].get(name)) is not None:
                    output[0].index_add_(0, rows, addition(inputs[0][rows]))

        return add


class Addition:
    """What an adapter adds to a projection's output, on this rank."""

    def __init__(self, layer: LinearBase, low_rank: LowRank, dtype: torch.dtype) -> None:
        of_layer = SimpleNamespace(base_layer=layer)
        split = SPLIT[type(layer)]
        self.a, self.b = (
            _product(part.to(dtype))
            for part in (
                split.slice_lora_a_weights(of_layer, low_rank.a),
                split.slice_lora_b_weights(of_layer, low_rank.b),
            )
        )
        # If the output is not reduced here, partial sums are reduced later.
        self.reduced = isinstance(layer, RowParallelLinear) and layer.reduce_results

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x [T, K of this rank], returns [T, N of this rank]."""
        low = self.a(x)
        if self.reduced and get_parallel().tp_size > 1:
            low = get_parallel().tp_group.all_reduce(low)
        return self.b(low)


class _NoPool:
    """What SGLang asks its pool of adapters."""

    def __init__(self, max_loras_per_batch: int, max_lora_rank: int | None) -> None:
        self.max_loras_per_batch, self.max_lora_rank = max_loras_per_batch, max_lora_rank

    def can_support(self, config: LoRAConfig) -> bool:
        return self.max_lora_rank is None or config.r <= self.max_lora_rank

    def remove_lora(self, uid: str) -> None:
        """Nothing to do."""


def _product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product by the kernel that a projection of this dtype has, so that bits agree.

    Shapes: weight [N, K]; the product takes [T, K] and returns [T, N]
    """
    if weight.dtype == torch.bfloat16:
        return make_product(weight)
    return partial(nn.functional.linear, weight=weight)
