"""The linear layer on state pages is the host's, whatever of a step's tokens a row keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import BASE, SHAPES
from tolerances import assert_close

NUM_DRAFTS = 3
N = NUM_DRAFTS + 1  # tokens of a row in a step that verifies drafts
PROMPTS = (21, 9, 1, 2)  # tokens of the rows' prompts, padded on the left to the longest
WIDTH = max(PROMPTS)
PADDING = [WIDTH - length for length in PROMPTS]
STEPS = 5  # after the prompt; rows pass several positions at which S is folded
SIZES = {name: SHAPES[name] for name in ("HV=H_K<V_6-layers", "HV=4H_dense-layers_top-3-of-12")}


def modeling(kind: str) -> tuple[type, type]:
    """The host's config and layer; qwen3_5's projections are flat."""
    if kind == "qwen3_next":
        from transformers.models.qwen3_next import modeling_qwen3_next as host

        return host.Qwen3NextConfig, host.Qwen3NextGatedDeltaNet
    from transformers.models.qwen3_5 import modeling_qwen3_5 as host

    return host.Qwen3_5TextConfig, host.Qwen3_5GatedDeltaNet


@pytest.fixture(params=SIZES)
def sizes(request) -> dict[str, Any]:
    return BASE | SIZES[request.param]


@pytest.fixture(params=["qwen3_next", "qwen3_5"])
def layers(request, sizes) -> tuple[Any, Any]:
    """The host's layer, and ours with the same random weights, which make the state matter."""
    from qwen3next_plugin.engines.transformers.model.linear_attention import on_pages

    config_class, host = modeling(request.param)
    config = config_class(**{k: v for k, v in sizes.items() if k != "model_type"})
    torch.manual_seed(0)
    theirs, ours = (made(config, layer_idx=0).eval() for made in (host, on_pages(host)))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name not in ("A_log", "dt_bias"):
                parameter.normal_().div_(parameter.shape[-1] ** 0.5)
        theirs.dt_bias.uniform_(-6, -2)
        theirs.A_log.uniform_(0, 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@torch.inference_mode()
def on_pages(layer: Any, texts: list[Tensor], kept: list[list[int]]) -> list[Tensor]:
    """Outputs of each row's prompt and kept tokens, where the steps' other tokens are noise.

    Shapes: texts [tokens, D] of each row; kept[i][row] of N tokens in step i
    """
    from qwen3next_plugin.engines.transformers.state.cache import RowCache
    from qwen3next_plugin.engines.transformers.state.steps import StepBuilder

    cache = RowCache(["linear_attention"], num_drafts=NUM_DRAFTS)
    positions = torch.arange(WIDTH).expand(len(texts), WIDTH)
    steps = StepBuilder(positions, PADDING, additive=None)

    def run(rows: list[Tensor], step: Any) -> Tensor:
        cache.begin(step)
        return layer(torch.stack(rows), cache_params=cache)

    prompts = [text.new_full((WIDTH, text.shape[1]), torch.nan) for text in texts]
    for prompt, text, skipped in zip(prompts, texts, PADDING, strict=True):
        prompt[skipped:] = text[: WIDTH - skipped]
    found = run(prompts, steps.prompt())
    outputs = [[out[skipped:]] for out, skipped in zip(found, PADDING, strict=True)]
    lengths = list(PROMPTS)
    for counts in kept:
        rows = []
        for text, length, count in zip(texts, lengths, counts, strict=True):
            noise = torch.randn(N - count, text.shape[1]).to(text.dtype)
            rows.append(torch.cat([text[length : length + count], noise]))
        starts = [length + skipped for length, skipped in zip(lengths, PADDING, strict=True)]
        found = run(rows, steps.build(starts, N))
        for row, count in enumerate(counts):
            outputs[row].append(found[row, :count])
            lengths[row] += count
    return [torch.cat(parts) for parts in outputs]


def texts_of(layer: Any, kept: list[list[int]]) -> list[Tensor]:
    """Hidden states of each row's prompt and of what it keeps."""
    more = torch.tensor(kept).sum(0).tolist()
    return [torch.randn(n + m, layer.hidden_size) for n, m in zip(PROMPTS, more, strict=True)]


@torch.inference_mode()
def whole(layer: Any, text: Tensor) -> Tensor:
    """What the host's layer computes of a row alone, all tokens at once."""
    return layer(text[None])[0]


@pytest.mark.parametrize("count", range(1, N + 1))
def test_a_row_goes_back_to_any_token(layers, count):
    """Each row keeps another number of tokens, and in each step another."""
    theirs, ours = layers
    kept = [[(count + i + row) % N + 1 for row in range(len(PROMPTS))] for i in range(STEPS)]
    texts = texts_of(theirs, kept)
    for found, text in zip(on_pages(ours, texts, kept), texts, strict=True):
        assert_close("gated_delta_rule", torch.float32, found, whole(theirs, text))


def test_the_native_kernels_agree_with_the_reference(layers, monkeypatch):
    theirs, ours = layers
    kept = [[1, 4, 2, 3]] * STEPS
    texts = texts_of(theirs, kept)
    found = {}
    for kernels in ("auto", "reference"):
        monkeypatch.setenv("QWEN3NEXT_KERNELS", kernels)
        found[kernels] = on_pages(ours, texts, kept)
    for native, reference in zip(found["auto"], found["reference"], strict=True):
        assert_close("gated_delta_rule", torch.float32, native, reference)


def test_a_rows_bits_do_not_depend_on_its_batch(layers):
    """Nor on padding: rows without a page hold it."""
    theirs, ours = layers
    kept = [[2, 3, 1, 4]] * STEPS
    texts = texts_of(theirs, kept)
    among_others = on_pages(ours, texts, kept)
    alone = on_pages(ours, [texts[0], *map(torch.zeros_like, texts[1:])], kept)
    assert torch.equal(alone[0], among_others[0])


def test_bf16_is_as_near_as_the_hosts_in_every_row(layers):
    theirs, ours = layers
    kept = [[1, 4, 2, 3]] * STEPS
    texts = texts_of(theirs, kept)
    exact = [whole(theirs, text) for text in texts]
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    texts = [text.bfloat16() for text in texts]
    for found, text, right in zip(on_pages(ours, texts, kept), texts, exact, strict=True):
        error = (found.float() - right).norm()
        assert error <= 1.1 * (whole(theirs, text).float() - right).norm()
