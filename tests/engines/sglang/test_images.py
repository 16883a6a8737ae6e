"""SGLang's vision tower around our text model: answers about images are transformers'."""

import base64
import json
import urllib.error
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
import torch
from torch import nn

from engines.checks import TOLERANCE
from engines.hostile import ask as ask_raw
from engines.images import ask_about, check_an_image_in_a_chat, check_hostile_images
from engines.sglang.server import FIXED, NEXTN, Answer, Forked
from family import FAMILY
from needs import needs
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from vision import PLACE, VisionReference, as_url, random_image, write_vision_checkpoint

pytestmark = pytest.mark.serve

TOKENS = 24
DENSE, MOE = (name for name, member in FAMILY.items() if member.wrapped)
SMALL = ("--dtype", "float32", "--max-total-tokens", "16384", "--max-mamba-cache-size", "40")
NODES = ("--speculative-num-draft-tokens", "5")
# Images that are no square, so that height and width differ; two in one prompt; text only.
PROMPTS = {
    "one": (f"def describe({PLACE}):", [(160, 64)]),
    "at-the-start": (f"{PLACE} import os", [(64, 96)]),
    "two": (f"first {PLACE} then {PLACE} and text after it", [(96, 64), (64, 160)]),
    "text": ("import os\n\n\ndef walk(top):", []),
}
text, sizes = PROMPTS["two"]
PROMPTS["two-and-more"] = (f"{text}<|im_end|>import os", sizes)  # begins with the same tokens


def images_of(name: str) -> list:
    return [random_image(*size, seed=i) for i, size in enumerate(PROMPTS[name][1])]


def ask(server: Forked, names: list[str]) -> list[Answer]:
    """The answers to prompts, all asked at once."""
    asked = {
        "text": [PROMPTS[name][0] for name in names],
        "image_data": [[as_url(image) for image in images_of(name)] or None for name in names],
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
        "return_logprob": True,
    }
    return [Answer.of(answer, **asked) for answer in server.post("/generate", **asked)]


def check(expected, name: str, answer: Answer) -> None:
    token_ids, logprobs = expected[name]
    assert answer.token_ids == token_ids, name
    assert (torch.tensor(answer.logprobs) - logprobs).abs().max() < TOLERANCE, name


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "plain": (DENSE, (), {}),
    # Chunks that end within an image, of 8 tokens while anyone waits.
    "switching": (
        DENSE,
        (*NEXTN, "3"),
        {"TEST_DRAFTS": "0,3,1,2", "QWEN3NEXT_STEP_SECONDS": "0.000001"},
    ),
    # Of 9, whoever waits.
    "steps-3_chunks-of-9": (MOE, (*NEXTN, "3", "--chunked-prefill-size", "9"), FIXED),
    "topk-2": (MOE, (*NEXTN, "2", "--speculative-eagle-topk", "2", *NODES), FIXED),
    "no-tower": (MOE, (*NEXTN, "3", "--language-model-only"), FIXED),
}
Expected = dict[str, tuple[tuple[int, ...], torch.Tensor]]


class Model(NamedTuple):
    """A checkpoint of the family, and transformers' answers to each prompt."""

    folder: Path
    reference: VisionReference
    expected: Expected


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Callable[[str], Model]:
    """A checkpoint of the family; each is written once."""

    @cache
    def make(member: str) -> Model:
        folder = write_vision_checkpoint(tmp_path_factory.mktemp("vision"), member=member)
        reference = VisionReference(folder)
        expected = {
            name: reference.greedy(text, images_of(name), TOKENS)
            for name, (text, _) in PROMPTS.items()
        }
        return Model(folder, reference, expected)

    return make


@pytest.fixture(scope="module", params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(case, model) -> Iterator[Forked]:
    member, flags, env = CASES[case]
    server = Forked(model(member).folder, *SMALL, *flags, env=env).wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def expected(case, model) -> Expected:
    return model(CASES[case][0]).expected


with_a_tower = pytest.mark.parametrize(
    "case", [name for name in CASES if name != "no-tower"], indirect=True, scope="module"
)


@with_a_tower
def test_answers_about_images_are_transformers(server, expected):
    for name in PROMPTS:
        check(expected, name, ask(server, [name])[0])
    for name, answer in zip(PROMPTS, ask(server, list(PROMPTS)), strict=True):
        check(expected, name, answer)


@with_a_tower
def test_drafts_follow_images_too(server, case):
    accepted = {name: ask(server, [name])[0].accepted for name in PROMPTS}
    assert all((n > 0) == (case != "plain") for n in accepted.values()), accepted


@with_a_tower
def test_an_image_is_found_in_the_cache(server, expected):
    server.forget()
    (cold,), (warm,) = ask(server, ["two"]), ask(server, ["two-and-more"])
    assert cold.cached == 0 < warm.cached
    check(expected, "two", cold)
    check(expected, "two-and-more", warm)


@with_a_tower
def test_an_image_in_a_chat(server, case, model):
    check_an_image_in_a_chat(server, model(CASES[case][0]).reference)


@pytest.mark.parametrize("case", ["plain"], indirect=True, scope="module")
def test_hostile_images_do_not_harm_the_server(server, case, model):
    check_hostile_images(server, model(CASES[case][0]).reference)


@pytest.mark.parametrize("case", ["plain"], indirect=True, scope="module")
@needs("no-videos")
def test_a_video_that_nothing_reads_is_refused(server):
    url = "data:video/mp4;base64," + base64.b64encode(b"a video").decode()
    with pytest.raises(openai.BadRequestError, match="install torchcodec or decord"):
        ask_about(server, {"type": "video_url", "video_url": {"url": url}})


@pytest.mark.parametrize("case", ["no-tower"], indirect=True, scope="module")
def test_without_the_tower_an_image_is_refused(server, expected):
    check(expected, "text", ask(server, ["text"])[0])
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask(server, ["one"])
    check(expected, "text", ask(server, ["text"])[0])


@pytest.mark.parametrize("case", ["plain", "no-tower"], indirect=True, scope="module")
def test_embeddings_are_scored_without_a_tower_only(server, case, model):
    weight = model(CASES[case][0]).reference.model.get_input_embeddings().weight.detach()
    asked = {"query": [5, 6], "items": [[7]], "label_token_ids": [3, 4], "model": server.model}
    override = {"embed_override_token_id": 6, "query_embed_overrides": [weight[9].tolist()]}
    status, text = ask_raw(server, "/v1/score", asked | override)
    if case == "plain":
        assert (status, "positional_embed_overrides: a model with a vision" in text) == (400, True)
    else:
        assert status == 200, text
        (found,) = json.loads(text)["scores"]
        (wanted,) = server.post("/v1/score", **asked | {"query": [5, 9]})["scores"]
        assert found == pytest.approx(wanted, abs=TOLERANCE)


def test_quantised_as_it_loads(tmp_path):
    folder = write_vision_checkpoint(tmp_path, member=MOE, rounded=True)
    reference = VisionReference(folder)
    env = FIXED | {"QWEN3NEXT_QUANTISE": "int8"}
    server = Forked(folder, *SMALL, *NEXTN, "3", env=env).wait()
    try:
        for name in ("one", "text"):
            text, _ = PROMPTS[name]
            expected = {name: reference.greedy(text, images_of(name), TOKENS)}
            check(expected, name, ask(server, [name])[0])
    finally:
        server.close()


def test_a_tower_with_either_prefix_is_loaded():
    from qwen3next_plugin.engines.sglang.model.wrapped import Qwen3_5ForConditionalGeneration

    model = Qwen3_5ForConditionalGeneration.__new__(Qwen3_5ForConditionalGeneration)
    nn.Module.__init__(model)
    model.visual = nn.Linear(2, 3)
    stored = {"visual.weight": torch.rand(3, 2), "model.visual.bias": torch.rand(3)}
    text = {"lm_head.weight": torch.rand(1)}
    assert dict(model._load_tower((stored | text).items())) == text
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(name.removeprefix("model.")), tensor)
    part = {"visual.weight": stored["visual.weight"]}
    with pytest.raises(
        CheckpointError, match=r"1 tensors of the vision tower .* is visual\.bias: "
    ):
        list(model._load_tower(part.items()))
