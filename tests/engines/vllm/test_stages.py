"""Pipeline stages, cut anywhere and chained in one process, are the whole model."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import random_prompt

PROMPT = random_prompt(70, seed=11)
CUTS = [(4, 4), (3, 5), (1, 7), (7, 1), (3, 1, 4), (1, 2, 2, 3), (2, 1, 1, 1, 1, 1, 1)]


@pytest.fixture(scope="module")
def vllm_config(checkpoint) -> Iterator:
    """A completed configuration and a world of one rank, in this process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, parallel_state
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=str(checkpoint), dtype="float32", max_model_len=512, enforce_eager=True,
        skip_tokenizer_init=True,
        speculative_config={"method": "qwen3_next_mtp", "num_speculative_tokens": 2},
    )  # fmt: skip
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=address, backend="gloo"
        )
        parallel_state.initialize_model_parallel()
        yield config
    cleanup_dist_env_and_memory()


@pytest.fixture
def make_stage(vllm_config, checkpoint, monkeypatch):
    """Builds and loads a model as one stage of a pipeline; vLLM asks the group where it stands."""
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    weights = load_file(checkpoint / "model.safetensors")

    def make(model_class, rank: int, layers: tuple[int, ...]):
        size = len(layers)
        group = SimpleNamespace(
            rank_in_group=rank,
            world_size=size,
            is_first_rank=rank == 0,
            is_last_rank=rank == size - 1,
        )
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, layers)))
        monkeypatch.setattr(parallel_state, "_PP", group)
        vllm_config.compilation_config.static_forward_context.clear()
        model = model_class(vllm_config=vllm_config).float().eval()
        model.load_weights(weights.items())
        process_weights_after_loading(model, vllm_config.model_config, torch.device("cpu"))
        return model

    return make


@torch.inference_mode()
def run(model, vllm_config, T: int, forward) -> torch.Tensor:
    """One prefill of T tokens with real linear-attention pages; attention without vLLM's cache."""
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention

    from qwen3next_plugin.engines.vllm.model.linear_attention import GatedDeltaNet
    from qwen3next_plugin.model.step import build_step

    step = build_step(
        query_start_loc=torch.tensor([0, T]),
        seq_lens=torch.tensor([T]),
        slot=torch.tensor([1]),
        num_tokens=T,
        num_slots=2,
        max_query_len=T,
    )
    steps = {}
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            pages = torch.zeros(2, 1, 1, module.layout.page_bytes, dtype=torch.int8)
            module.bind_kv_cache(pages)
            steps[module.prefix] = step
        elif isinstance(module, Attention):
            module.forward = attend(module.head_size)
    with set_forward_context(steps, vllm_config, num_tokens=T):
        return forward(model)


def attend(D: int):
    """Causal attention in place of vLLM's paged one."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (-1, D)).transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1).contiguous()

    return forward


@pytest.mark.parametrize("layers", [(8,), *CUTS], ids=str)
def test_trunk(make_stage, vllm_config, checkpoint, reference, layers):
    from qwen3next_plugin.engines.vllm.model.trunk import Qwen3NextForCausalLM

    ids, positions = torch.tensor(PROMPT), torch.arange(len(PROMPT))
    passed = None
    for rank in range(len(layers)):
        stage = make_stage(Qwen3NextForCausalLM, rank, layers)
        held = [i for i, layer in enumerate(stage.model.layers) if hasattr(layer, "mlp")]
        assert held == list(range(sum(layers[:rank]), sum(layers[: rank + 1])))
        tensors = passed  # what this stage is handed
        passed = run(stage, vllm_config, len(ids), lambda m, t=tensors: m(ids, positions, t))
        if rank + 1 < len(layers):
            assert set(passed.tensors) == {"hidden_states", "residual"}
            empty = stage.make_empty_intermediate_tensors(3, torch.float32, "cpu")
            assert set(empty.tensors) == set(passed.tensors)
    expected = reference(checkpoint).hidden(PROMPT)
    torch.testing.assert_close(passed, expected, rtol=1e-3, atol=1e-3)


def test_ops_are_loaded_with_the_model(make_stage, monkeypatch):
    """A graph from vLLM's cache calls them, and was traced in another process."""
    from qwen3next_plugin.engines.vllm.model.trunk import Qwen3NextForCausalLM
    from qwen3next_plugin.kernels import dispatch

    monkeypatch.setattr(dispatch, "_LOADED", {})
    make_stage(Qwen3NextForCausalLM, 0, (8,))
    assert {op for _, _, op in dispatch._LOADED} == set(dispatch.OPS)
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")  # too late
    for op in dispatch.OPS:
        found = dispatch.implementation(op, torch.device("cpu"))
        assert found is dispatch._LOADED["cpu", "cpu", op]


@pytest.mark.parametrize("layers", [(8,), (4, 4), (3, 5)], ids=str)
def test_drafter_on_the_last_stage(make_stage, vllm_config, checkpoint, reference, layers):
    """It has an embedding of its own there, the trunk's being on the first stage."""
    from qwen3next_plugin.engines.vllm.model.mtp import Qwen3NextMTP
    from reference import MTPReference

    drafter = make_stage(Qwen3NextMTP, len(layers) - 1, layers)
    trunk = reference(checkpoint)
    hidden, ids = trunk.hidden(PROMPT[:-1]), torch.tensor(PROMPT[1:])
    if len(layers) == 1:  # vLLM shares the trunk's, as here
        drafter.model.embed_tokens = trunk.trunk.model.embed_tokens
    else:
        assert torch.equal(drafter.model.embed_tokens.weight, trunk.trunk.model.embed_tokens.weight)
    positions = torch.arange(len(ids))
    found = run(drafter, vllm_config, len(ids), lambda m: m(ids, positions, hidden))
    head = MTPReference(trunk)
    expected = head(trunk.trunk.model.embed_tokens(ids).detach(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
