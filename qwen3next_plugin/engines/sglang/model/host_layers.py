"""The layers of SGLang's that the neutral ones are built of."""

from functools import partial

from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from qwen3next_plugin.model.host_layers import HostLayers, activation


def host_layers(quant_config: QuantizationConfig | None) -> HostLayers:
    """Split among tensor-parallel ranks."""
    return HostLayers(
        column_parallel=partial(ColumnParallelLinear, quant_config=quant_config),
        merged_column_parallel=partial(MergedColumnParallelLinear, quant_config=quant_config),
        qkv_parallel=partial(QKVParallelLinear, quant_config=quant_config),
        row_parallel=partial(RowParallelLinear, quant_config=quant_config),
        replicated=partial(ReplicatedLinear, quant_config=quant_config),
        silu_and_mul=activation(SiluAndMul),
    )
