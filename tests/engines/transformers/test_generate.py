"""`generate(use_mtp=True)`: the same answers as without, in fewer steps."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import utils

from checkpoints import SHAPES, SHIPPED, random_prompt, write_checkpoint
from engines import damaged
from engines.transformers.checks import TOKENS, both, check_drafts, left_padded
from family import FAMILY
from quantised import pack_checkpoint
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from reference import Reference, fused_mtp
from tiers import long_except

PROMPTS = tuple(random_prompt(length) for length in (9, 14, 1))
QWEN3_NEXT = ("HV=4H_dense-layers_top-3-of-12", "tied_bias_one-kv-head")
QWEN3_5 = ("dense_HV=3H_wrapped_7-layers", "moe_HV=2H_wrapped_split_6-layers")


@pytest.fixture(scope="module")
def load() -> Callable[[Path], Any]:
    """A checkpoint's model in fp32, loaded once."""
    return cache(lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of four layers, one of them full attention."""
    return write_checkpoint(tmp_path_factory.mktemp("small"), num_hidden_layers=4)


@pytest.fixture
def model(load, small) -> Any:
    return load(small)


@pytest.mark.parametrize("case", damaged.FILES)
def test_a_damaged_file_is_named(tmp_path, case):
    fault = damaged.FILES[case]
    with pytest.raises((ConfigError, CheckpointError), match=fault.message):
        AutoModelForCausalLM.from_pretrained(fault.write(tmp_path))


def test_two_mtp_layers_are_refused(tmp_path):
    folder = damaged.CONFIGS["two MTP layers"].write(tmp_path)
    with pytest.raises(ConfigError, match=r"num_nextn_predict_layers = 2: .* one MTP layer"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_index_needs_metadata_in_transformers(tmp_path):
    folder = write_checkpoint(tmp_path, num_hidden_layers=4)
    (folder / damaged.INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(CheckpointError, match=r'has no metadata, .* add "metadata": {} to it'):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_packed_checkpoint_is_refused(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", num_hidden_layers=4)
    out = pack_checkpoint(plain, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match=r"out is packed for vLLM and SGLang on a CPU; load"):
        AutoModelForCausalLM.from_pretrained(out)


def test_all_weights_are_kept(small, tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(
        small, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = fused_mtp(small)
    found = model.mtp.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (small, tmp_path))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_hosts_snippet_speculates(steps):
    """As a user writes it; `auto` needs accelerate, the host says."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="auto", device_map="auto")
    inputs = AutoTokenizer.from_pretrained(SHIPPED)("import os\n\n\ndef", return_tensors="pt")
    answer = model.generate(**inputs, use_mtp=True, max_new_tokens=24, do_sample=False)
    assert model.dtype == torch.bfloat16
    assert len(steps) < answer.shape[1] - inputs["input_ids"].shape[1]


@pytest.mark.parametrize("drafts", [1, 4])
def test_greedy_text_is_the_same(model, steps, drafts):
    plain, ours = both(model, PROMPTS[:1], num_assistant_tokens=drafts)
    assert torch.equal(ours, plain)
    assert len(steps) < TOKENS
    assert max(steps[1:]) == drafts + 1


def test_the_shipped_checkpoint_answers_the_same(load, steps):
    model = load(SHIPPED)
    inputs = AutoTokenizer.from_pretrained(SHIPPED)("import os\n\n\ndef walk", return_tensors="pt")
    settings = {"max_new_tokens": 48, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, use_mtp=True), plain)
    assert len(steps) < 32


@pytest.mark.parametrize("name", long_except(QWEN3_NEXT, SHAPES))
def test_every_shape_of_qwen3_next(tmp_path, load, steps, name):
    model = load(write_checkpoint(tmp_path, **SHAPES[name]))
    plain, ours = both(model, PROMPTS)
    assert torch.equal(ours, plain)
    assert len(steps) < TOKENS


@pytest.mark.parametrize("name", long_except(QWEN3_5, FAMILY))
def test_every_layout_of_qwen3_5(tmp_path, load, steps, name):
    model = load(FAMILY[name].write(tmp_path))
    plain, ours = both(model, PROMPTS)
    assert torch.equal(ours, plain)
    assert len(steps) < TOKENS


def test_the_text_model_of_minicpm_v(tmp_path, steps):
    """As transformers' own class answers, whose tower is not in the file."""
    from qwen3next_plugin.engines.transformers.model.trunk import text_config_of

    folder = FAMILY["dense_HV=3H_wrapped_7-layers"].write(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    tower = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    raw = {
        "model_type": "minicpmv4_6",
        "text_config": raw["text_config"],
        "vision_config": tower | {"intermediate_size": 32, "image_size": 28},
        "insert_layer_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": {"bits": 4}}))
    text = text_config_of(AutoConfig.from_pretrained(folder))
    assert text.quantization_config == {"bits": 4}  # else weights would be read as they lie
    (folder / "config.json").write_text(json.dumps(raw))
    host = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = left_padded(PROMPTS)
    plain = host.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    same, ours = both(model, PROMPTS)
    assert torch.equal(same, plain)
    assert torch.equal(ours, plain)
    assert len(steps) < TOKENS


@pytest.fixture
def backends(monkeypatch) -> dict[str, None]:
    """The backends that run ops, each once."""
    from qwen3next_plugin.kernels import dispatch

    seen: dict[str, None] = {}
    backend = dispatch.backend

    def recording(op: str, device_type: str) -> str:
        seen[backend(op, device_type)] = None
        return backend(op, device_type)

    monkeypatch.setattr(dispatch, "backend", recording)
    return seen


@pytest.mark.parametrize(
    ("asked", "runs"), [(None, "cpu"), ("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")]
)
def test_linear_layers_run_on_the_kernels_asked_for(model, backends, monkeypatch, asked, runs):
    monkeypatch.delenv("QWEN3NEXT_KERNELS", raising=False)
    if asked:
        monkeypatch.setenv("QWEN3NEXT_KERNELS", asked)
    plain, ours = both(model, PROMPTS)
    assert torch.equal(ours, plain)
    assert list(backends) == [runs]


def test_kernels_that_do_not_run_here_are_refused_at_once(model, monkeypatch, steps):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match="triton kernels run on cuda, not on cpu"):
        both(model, PROMPTS)
    assert not steps


def test_padding_before_one_prompt_changes_nothing(model):
    inputs = left_padded((PROMPTS[0], (1,) * 20))
    padded = {name: value[:1] for name, value in inputs.items()}
    given = {"max_new_tokens": TOKENS, "do_sample": False}
    plain = model.generate(**padded, **given)
    ours = model.generate(**padded, **given, use_mtp=True)
    assert torch.equal(ours, plain)
    assert torch.equal(ours[:, 20 - len(PROMPTS[0]) :], both(model, PROMPTS[:1])[1])


def test_offloaded_layers_answer_the_same(small, load, tmp_path):
    """Their weights are loaded from the disk whenever a layer runs."""
    whole = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "mtp")
    places = dict.fromkeys(whole, "cpu") | {"model.layers": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        small, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(both(offloaded, PROMPTS)[1], both(load(small), PROMPTS)[1])


def test_drafts_are_those_of_the_mtp_head(model, small, made):
    _, ours = both(model, PROMPTS[:1])
    check_drafts(Reference(small), PROMPTS[0], ours, made)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_batch_answer_as_alone(model, attention):
    model.set_attn_implementation(attention)
    try:
        plain, ours = both(model, PROMPTS)
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(ours, plain)


def test_a_row_that_ends_is_padded(model):
    """The end token is one that some row reaches early, another late."""
    plain, _ = both(model, PROMPTS)
    width = max(map(len, PROMPTS))
    end = int(plain[0, width + 5])
    plain, ours = both(model, PROMPTS, eos_token_id=end, pad_token_id=2)
    assert torch.equal(ours, plain)
    assert (plain[0, width + 7 :] == 2).all()


def test_stop_strings(load):
    model, tokenizer = load(SHIPPED), AutoTokenizer.from_pretrained(SHIPPED)
    inputs = tokenizer(
        ["import os\n\n\ndef walk(top):\n", "class Stack:\n"], return_tensors="pt", padding=True,
        padding_side="left",
    )  # fmt: skip
    given = {"max_new_tokens": 40, "do_sample": False}
    begin = inputs["input_ids"].shape[1] + 5
    written = model.generate(**inputs, **given)[0, begin : begin + 6]
    given |= {"stop_strings": [tokenizer.decode(written)[1:-1]], "tokenizer": tokenizer}
    plain = model.generate(**inputs, **given)
    ours = model.generate(**inputs, **given, use_mtp=True)
    assert torch.equal(ours, plain)
    assert plain.shape[1] > begin + 6  # the other row goes on
    assert (plain[0, begin + 6 :] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("end", [None, 1])
def test_own_criteria(model, end):
    """Without an end token the host goes on with every row until all rows have ended."""

    def after_even(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return (ids[:, -1] % 7 == 0) & (ids[:, -2] % 2 == 0)

    plain, ours = both(model, PROMPTS, stopping_criteria=[after_even], eos_token_id=end)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("end", [None, 1])
def test_own_criteria_see_the_scores_of_their_step(model, end):
    kept = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": end}
    plain, _ = both(model, PROMPTS, **kept)
    sure = torch.stack([scores.softmax(-1).amax(-1) for scores in plain.scores])
    least = sure.quantile(0.1)

    def unsure(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return scores[-1].softmax(-1).amax(-1) < least

    plain, ours = both(model, PROMPTS, stopping_criteria=[unsure], **kept)
    assert torch.equal(ours.sequences, plain.sequences)
    assert len(ours.scores) == len(plain.scores) < TOKENS


def test_a_callers_limit_takes_the_place_of_the_hosts(model):
    limit = StoppingCriteriaList([MaxLengthCriteria(len(PROMPTS[0]) + TOKENS + 9)])
    plain, ours = both(model, PROMPTS[:1], stopping_criteria=limit, eos_token_id=None)
    assert ours.shape[1] == len(PROMPTS[0]) + TOKENS + 9
    assert torch.equal(ours, plain)


def test_ranks_that_wait_for_each_other_are_refused(model, monkeypatch):
    monkeypatch.setattr(utils, "is_fsdp_managed_module", lambda _: True)
    monkeypatch.setattr(utils, "_get_torch_distributed_world_size", lambda: 2)
    with pytest.raises(ValueError, match="use_mtp=True under ZeRO-3 or FSDP"):
        model.generate(torch.tensor([[3, 4, 5]]), use_mtp=True, max_new_tokens=4)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
def test_a_streamer_gets_every_token_once_and_in_order(model, prompts):
    class Streamer:
        def __init__(self) -> None:
            self.columns, self.ended = [], 0

        def put(self, value: torch.Tensor) -> None:
            self.columns.append(value.tolist())

        def end(self) -> None:
            self.ended += 1

    streamers = [Streamer(), Streamer()]
    inputs = left_padded(prompts)
    for streamer, use_mtp in zip(streamers, (False, True), strict=True):
        model.generate(
            **inputs, streamer=streamer, use_mtp=use_mtp, max_new_tokens=TOKENS, do_sample=False
        )
    assert streamers[1].columns == streamers[0].columns
    assert streamers[1].ended == 1


def test_processors_see_the_rows_own_tokens(model):
    plain, ours = both(
        model, PROMPTS, repetition_penalty=1.3, no_repeat_ngram_size=3, min_new_tokens=12,
        eos_token_id=7,
    )  # fmt: skip
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
def test_scores_and_logits_are_those_of_the_plain_loop(model, prompts):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, ours = both(model, prompts, **wanted)
    assert torch.equal(ours.sequences, plain.sequences)
    for kind in ("scores", "logits"):
        torch.testing.assert_close(ours[kind], plain[kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_a_seed_gives_the_same_sample(model, steps, seed):
    given = {"max_new_tokens": 32, "do_sample": True, "temperature": 0.9, "top_k": 20}
    inputs = left_padded(PROMPTS[:1])
    torch.manual_seed(seed)
    plain = model.generate(**inputs, **given)
    torch.manual_seed(seed)
    assert torch.equal(model.generate(**inputs, **given, use_mtp=True), plain)
    assert len(steps) < 32


def test_rows_of_a_batch_sample_the_models_distribution(model):
    """The first two tokens of many rows; without drafts the second would be as likely."""
    rows, given = 300, {"max_new_tokens": 3, "do_sample": True, "top_k": 3}
    torch.manual_seed(0)
    inputs = {"input_ids": torch.tensor([PROMPTS[0]])}
    found = model.generate(**inputs, **given, use_mtp=True, num_return_sequences=rows)
    found = found[:, len(PROMPTS[0]) :]
    chances = _chances(model, PROMPTS[0])
    for pair, chance in chances.items():
        count = int((found[:, :2] == torch.tensor(pair)).all(1).sum())
        assert abs(count - rows * chance) < 4.5 * (rows * chance * (1 - chance) + 1) ** 0.5, pair
    assert sum(chances.values()) == pytest.approx(1)


@torch.no_grad()
def _chances(model: Any, prompt: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """The chance of each pair of tokens behind the prompt, among the likeliest three each."""

    def likeliest(ids: tuple[int, ...]) -> list[tuple[int, float]]:
        logits, tokens = model(torch.tensor([ids])).logits[0, -1].topk(3)
        return list(zip(tokens.tolist(), logits.softmax(-1).tolist(), strict=True))

    return {
        (first, second): p * q
        for first, p in likeliest(prompt)
        for second, q in likeliest((*prompt, first))
    }


def test_the_example_shows_the_same_text_twice(capsys):
    from examples.transformers_mtp import main

    prompt = "import os\n"
    main([prompt], model=str(SHIPPED), draft_tokens=2, max_tokens=12, dtype="float32")
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+): [\d.]+ tokens per second$", printed, re.MULTILINE) == [
        "plain",
        "use_mtp",
    ]
    assert f"--- {prompt!r}" in printed


def test_without_use_mtp_the_host_decodes(model, steps):
    model.generate(**left_padded(PROMPTS), max_new_tokens=4, do_sample=False)
    assert not steps


REFUSALS = {
    "assistant_model": ({"assistant_model": object()}, "assistant_model: .*leave"),
    "beams": ({"num_beams": 2}, "num_beams=2: beam search"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "too many drafts": ({"num_assistant_tokens": 9}, "num_assistant_tokens=9: .* 1 to 8"),
    "no drafts": ({"num_assistant_tokens": 0}, "num_assistant_tokens=0"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds: .*input_ids"),
    "attentions": ({"output_attentions": True}, "output_attentions"),
    "right padding": (
        {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
        "padding_side='left'",
    ),
    "a hole": (
        {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])},
        "padding behind a token",
    ),
    "prefix function": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [3, 4]},
        "PrefixConstrained.* one prompt at a time",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_drafts_do_not_go_with_is_refused(model, case):
    given, message = REFUSALS[case]
    inputs = {} if "inputs_embeds" in given else {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **given, use_mtp=True, max_new_tokens=4)


def test_a_dtype_that_no_kernel_takes_is_refused(small):
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"use_mtp=True with torch\.float64: .* bfloat16, float16"):
        model.generate(torch.tensor([[3, 4]]), use_mtp=True)


def test_a_checkpoint_without_mtp_loads_and_refuses_drafts(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, mtp=False))
    assert model.mtp is None
    with pytest.raises(ValueError, match=r"no mtp\.\* tensors .* leave use_mtp out"):
        model.generate(torch.tensor([[3, 4]]), use_mtp=True)


def test_a_part_of_an_mtp_head_is_refused(tmp_path):
    from safetensors.torch import save_file

    file = write_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["mtp.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"1 MTP tensors are missing.*mtp\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
