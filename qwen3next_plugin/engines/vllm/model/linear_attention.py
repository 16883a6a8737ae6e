"""Gated DeltaNet as a vLLM layer: vLLM's projections and pages around the neutral layer."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.vllm.names import BACKEND_NAME
from qwen3next_plugin.model.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    Weight,
    gated_delta_net,
    launch_idle,
)
from qwen3next_plugin.model.state import PageLayout, StateError, StatePool
from qwen3next_plugin.model.weights import shard_conv_weight

STATE_DTYPES = ("float32", "bfloat16")


def page_layout(config: Qwen3NextConfig, vllm_config: VllmConfig) -> PageLayout:
    """The page of one linear layer of this rank, under these engine flags."""
    state_dtype = vllm_config.cache_config.mamba_ssm_cache_dtype
    if state_dtype == "auto":  # vLLM would take the activations' dtype; a recurrence drifts in bf16
        state_dtype = "float32"
    if state_dtype not in STATE_DTYPES:
        raise ConfigError(
            f"mamba_ssm_cache_dtype = {state_dtype!r}: the state is kept in one of "
            f"{', '.join(STATE_DTYPES)}; leave --mamba-ssm-cache-dtype out for float32"
        )
    return PageLayout(
        num_key_heads=config.linear_num_key_heads_per_rank,
        num_value_heads=config.linear_num_value_heads_per_rank,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        draft_tokens=vllm_config.num_speculative_tokens,
        activation_dtype=vllm_config.model_config.dtype,
        state_dtype=getattr(torch, state_dtype),
    )


class GatedDeltaNet(nn.Module, MambaBase):
    """One linear-attention layer; its state is one opaque page of bytes to vLLM."""

    def __init__(self, config: Qwen3NextConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.layout = page_layout(config, vllm_config)
        layout = self.layout
        self.shape = GatedDeltaNetShape(
            layout.num_key_heads, layout.num_value_heads, layout.key_dim, layout.value_dim
        )
        self.value_dim = config.value_dim_per_rank
        self.norm_eps = config.rms_norm_eps
        quant_config = vllm_config.quant_config
        # One output size each: the checkpoint's rows are grouped by key head, so that a rank's
        # share is one contiguous run, for the weight and for a LoRA on it alike.
        self.in_proj_qkvz = MergedColumnParallelLinear(
            config.hidden_size,
            [config.in_proj_qkvz_size],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_qkvz",
        )
        self.in_proj_ba = MergedColumnParallelLinear(
            config.hidden_size,
            [config.in_proj_ba_size],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_ba",
        )
        self.out_proj = RowParallelLinear(
            config.value_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self._make_parameters(config)
        self._announce()

    def _make_parameters(self, config: Qwen3NextConfig) -> None:
        """The small parameters that no vLLM layer holds, each with its loader."""
        HV = self.shape.num_value_heads
        self.conv1d = Weight(self.layout.conv_dim, 1, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.norm = Weight(self.shape.value_dim)

        def load_conv(param: nn.Parameter, loaded: torch.Tensor) -> None:
            rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            dims = (config.key_dim, config.key_dim, config.value_dim)
            param.data.copy_(shard_conv_weight(loaded, dims, rank, size))

        set_weight_attrs(self.conv1d.weight, {"weight_loader": load_conv})
        set_weight_attrs(self.A_log, {"weight_loader": sharded_weight_loader(0)})
        set_weight_attrs(self.dt_bias, {"weight_loader": sharded_weight_loader(0)})

    def _announce(self) -> None:
        """Let vLLM find this layer, to give it its pages and its step."""
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if self.prefix in layers:
            raise ValueError(f"Duplicate layer name: {self.prefix}")
        layers[self.prefix] = self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Shapes: hidden_states [T, D], returns [T, D]."""
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        core = qkvz.new_empty(qkvz.shape[0], self.value_dim)
        torch.ops.vllm.qwen3next_gated_delta_net(qkvz, ba, core, self.prefix)
        output, _ = self.out_proj(core)
        return output

    def attend(self, qkvz: torch.Tensor, ba: torch.Tensor, out_: torch.Tensor) -> None:
        """Run the layer's recurrence on this step's rows; between engine steps, nothing."""
        step = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if step is None:  # profiling and tuning: no pages
            out_.zero_()
            return
        assert self.pool is not None
        try:
            gated_delta_net(
                qkvz=qkvz,
                ba=ba,
                weights=self.weights,
                shape=self.shape,
                pool_=self.pool,
                step=step,
                out_=out_,
            )
        except RuntimeError as error:
            raise StateError(self.prefix, str(error)) from error

    # What vLLM asks of a layer with a recurrent state.

    @property
    def kv_cache(self) -> Sequence[torch.Tensor]:
        """The pages as vLLM copies them."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, pages: Sequence[torch.Tensor]) -> None:
        """Also by vLLM, which empties it to have the memory back: then nothing may hold on."""
        self._kv_cache = pages
        self.pool: StatePool | None = None

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's pages: `kv_cache` [slots, 1, 1, bytes] int8."""
        pages = kv_cache.squeeze(dim=(1, 2))
        self.kv_cache = (pages[:, : self.layout.page_bytes],)  # what vLLM copies
        self.pool = self.layout.view(pages)
        self.weights = GatedDeltaNetWeights(
            conv=self.conv1d.weight.data.squeeze(1),
            A_log=self.A_log.data,
            dt_bias=self.dt_bias.data,
            norm=self.norm.weight.data,
            norm_eps=self.norm_eps,
        )
        if self.pool.span.device.type != "cpu":  # nothing is compiled at the first request
            launch_idle(weights=self.weights, shape=self.shape, pool_=self.pool)

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return ((self.layout.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND_NAME]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        """One page a request, also under speculation: its window stands for the draft slots.

        Declared as large as the block that vLLM pads it to: for a hit on a part of a block vLLM
        0.32 copies only as much of it as the first layer that lies there declares, and KV lies in
        the same place. Can go when it copies whole blocks: a test marked `compat`.
        """
        cache_config = vllm_config.cache_config
        return MambaSpec(
            shapes=((cache_config.mamba_page_size_padded or self.layout.page_bytes,),),
            dtypes=self.get_state_dtype(),
            block_size=cache_config.mamba_block_size,
            mamba_type=self.mamba_type,
            mamba_cache_mode=cache_config.mamba_cache_mode,
            num_speculative_blocks=0,
        )


@eager_break_during_capture
def _gated_delta_net(
    qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor, layer_name: str
) -> None:
    """Opaque to the compiler. To out [T, value_dim], made before: graphs are cut at this op, and
    the next one reads where it read when it was captured."""
    get_forward_context().no_compile_layers[layer_name].attend(qkvz, ba, out)


def _gated_delta_net_fake(
    qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor, layer_name: str
) -> None:
    return None


direct_register_custom_op(
    op_name="qwen3next_gated_delta_net",
    op_func=_gated_delta_net,
    mutates_args=["out"],
    fake_impl=_gated_delta_net_fake,
)
