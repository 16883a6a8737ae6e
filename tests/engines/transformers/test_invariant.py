"""QWEN3NEXT_BATCH_INVARIANT=1: a token's bits are the same in any batch, and in any loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints import SHAPES, random_prompt, write_checkpoint
from family import FAMILY
from qwen3next_plugin.config import ConfigError
from tiers import long_except

TOKENS = 20
PROMPTS = tuple(random_prompt(length) for length in (9, 70, 1))
CHECKPOINTS = (*SHAPES, *FAMILY)
SOME = ("HV=4H_dense-layers_top-3-of-12", "dense_HV=3H_wrapped_7-layers")


def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A checkpoint's model in that mode, which it keeps."""
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(params=long_except(SOME, CHECKPOINTS))
def model(request, tmp_path, monkeypatch) -> Any:
    if request.param in FAMILY:
        return load(FAMILY[request.param].write(tmp_path), monkeypatch)
    return load(write_checkpoint(tmp_path, **SHAPES[request.param]), monkeypatch)


@pytest.fixture
def small(tmp_path, monkeypatch) -> Any:
    return load(write_checkpoint(tmp_path / "small", num_hidden_layers=4), monkeypatch)


def padded(texts: Sequence[Sequence[int]], *, left: bool) -> dict[str, torch.Tensor]:
    longest = max(map(len, texts))
    rows, masks = [], []
    for text in texts:
        padding, real = [0] * (longest - len(text)), [1] * len(text)
        rows.append([*padding, *text] if left else [*text, *padding])
        masks.append([*padding, *real] if left else [*real, *padding])
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def alone(model: Any, text: Sequence[int]) -> torch.Tensor:
    """Shapes: returns [T, V]"""
    return model(torch.tensor([list(text)])).logits[0]


@pytest.mark.parametrize("left", [False, True])
def test_in_a_batch(model, left):
    inputs = padded(PROMPTS, left=left)
    logits = model(**inputs).logits
    assert logits.dtype == torch.float32
    for text, mask, found in zip(PROMPTS, inputs["attention_mask"], logits, strict=True):
        assert torch.equal(found[mask.bool()], alone(model, text))


def test_texts_behind_one_another(small):
    flat = torch.tensor([[token for text in PROMPTS for token in text]])
    positions = torch.cat([torch.arange(len(text)) for text in PROMPTS])[None]
    found = small(flat, position_ids=positions).logits[0]
    assert torch.equal(found, torch.cat([alone(small, text) for text in PROMPTS]))


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_answers(model, drafts):
    """Step by step, and with drafts, logits are those of a pass over the whole text."""
    more = {"use_mtp": True, "num_assistant_tokens": drafts} if drafts else {}
    done = model.generate(
        **padded(PROMPTS, left=True),
        **more,
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(done.logits, dim=1)  # [B, TOKENS, V]
    for text, ids, found in zip(PROMPTS, done.sequences, logits, strict=True):
        answer = ids[-TOKENS:].tolist()
        assert torch.equal(found, alone(model, [*text, *answer])[len(text) - 1 : -1])
        assert answer == found.argmax(-1).tolist()


def test_near_the_host(small, tmp_path, monkeypatch):
    """It is the same model: about as far from fp32 as the host's own bf16."""
    monkeypatch.delenv("QWEN3NEXT_BATCH_INVARIANT")
    exact, host = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=dtype)(
            torch.tensor([PROMPTS[1]])
        ).logits[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    ours = alone(small, PROMPTS[1])
    assert (ours - exact).norm() < 1.2 * (host.float() - exact).norm()


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.mul_(1.5)


def replaced(model: Any) -> None:
    norm = model.model.layers[3].self_attn.q_norm
    norm.weight = torch.nn.Parameter(norm.weight + 1)


def behind_its_back(model: Any) -> None:
    model.lm_head.weight.data.mul_(2)
    model.model.layers[1].linear_attn.out_proj.weight.data.mul_(2)
    model.eval()


@pytest.mark.parametrize("change", [changed_in_place, replaced, behind_its_back])
def test_other_weights(small, change, tmp_path, monkeypatch):
    before = alone(small, PROMPTS[0])
    change(small)
    after = alone(small, PROMPTS[0])
    assert not torch.equal(after, before)
    small.save_pretrained(tmp_path / "changed")
    assert torch.equal(alone(load(tmp_path / "changed", monkeypatch), PROMPTS[0]), after)


def test_files_are_as_before(small, tmp_path):
    alone(small, PROMPTS[0])
    small.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "small" / "model.safetensors").items():
        dtype = torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16
        assert torch.equal(saved[name], tensor.to(dtype)), name


def test_refuses(small, tmp_path, monkeypatch):
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match=r"BATCH_INVARIANT=1: .* no gradients; call model.eval"):
        small.train()(ids)
    with torch.no_grad():
        small(ids)
    small.eval()
    with pytest.raises(ValueError, match=r"=1 with output_hidden_states: .* leave it out"):
        small(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"=1 with num_beams=2: .*; use 1"):
        small.generate(ids, num_beams=2)
    with pytest.raises(ValueError, match=r"=1: the position_ids of each text count up from 0"):
        small(ids, position_ids=torch.arange(1, 10)[None])
    with pytest.raises(ValueError, match=r"=1: attention_mask is one number for each token"):
        small(ids, attention_mask=torch.ones(1, 1, 9, 9))
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    with pytest.raises(ConfigError, match=r"=1: in torch\.float32, .* bfloat16"):
        exact(ids)
    small.model.layers[0].linear_attn.out_proj = torch.nn.Sequential()
    with pytest.raises(NotImplementedError, match=r"=1: out_proj is a Sequential; only plain"):
        small(ids)


def test_refuses_a_cache(small):
    from transformers import DynamicCache

    from qwen3next_plugin.engines.transformers.state.cache import CACHE

    cache = DynamicCache(config=small.config)
    with pytest.raises(ValueError, match=r"BATCH_INVARIANT=1 with .*: the host's cache cannot"):
        small(torch.tensor([PROMPTS[0]]), **{CACHE: cache})
