"""The layers of vLLM's that the neutral ones are built of."""

from functools import partial

from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from qwen3next_plugin.model.host_layers import HostLayers, activation


def host_layers(vllm_config: VllmConfig, *, disable_tp: bool = False) -> HostLayers:
    """Split among tensor-parallel ranks unless `disable_tp`."""
    options = {"quant_config": vllm_config.quant_config, "disable_tp": disable_tp}
    return HostLayers(
        column_parallel=partial(ColumnParallelLinear, **options),
        merged_column_parallel=partial(MergedColumnParallelLinear, **options),
        qkv_parallel=partial(QKVParallelLinear, **options),
        row_parallel=partial(RowParallelLinear, **options),
        replicated=partial(ReplicatedLinear, quant_config=vllm_config.quant_config),
        silu_and_mul=activation(SiluAndMul),
    )
