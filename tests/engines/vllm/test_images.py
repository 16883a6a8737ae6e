"""vLLM's vision tower around our text model: answers about images are transformers'."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from engines.checks import TOLERANCE, Output
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from family import FAMILY
from vision import PLACE, VisionReference, random_image, write_vision_checkpoint

pytestmark = pytest.mark.serve

TOKENS = 16
DENSE, MOE = (name for name, member in FAMILY.items() if member.wrapped)
FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "skip_tokenizer_init": False,  # a processor of images reads text
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 4},
}
# Images that are no square, so that height and width differ; several in one prompt; text only.
PROMPTS = {
    "one": (f"def describe({PLACE}):", [(160, 64)]),
    "at-the-start": (f"{PLACE} import os", [(64, 96)]),
    "two": (f"first {PLACE} then {PLACE} and text after it", [(96, 64), (64, 160)]),
    "text": ("import os\n\n\ndef walk(top):", []),
    "long": (f"{PLACE * 5}{'import os, sys ' * 20}", [(256, 256 - 32 * i) for i in range(5)]),
}
text, sizes = PROMPTS["long"]
PROMPTS["long-and-more"] = (f"{text}<|im_end|>import os", sizes)  # begins with the same tokens


class Expected(NamedTuple):
    """transformers' answer to a prompt."""

    token_ids: tuple[int, ...]
    logprobs: torch.Tensor
    prompt_logprobs: torch.Tensor


class Served(NamedTuple):
    engine: Offline
    expected: dict[str, Expected]


def images_of(name: str) -> list:
    return [random_image(*size, seed=i) for i, size in enumerate(PROMPTS[name][1])]


def ask(engine: Offline, names: list[str], **params: Any) -> list[Output]:
    """The answers to prompts, all asked at once."""
    prompts = [
        {"prompt": PROMPTS[name][0], "multi_modal_data": {"image": images_of(name)}}
        for name in names
    ]
    return engine.greedy(prompts, TOKENS, **LOGPROBS | params)


def check(expected: dict[str, Expected], name: str, answer: Output) -> None:
    token_ids, *logprobs = expected[name]
    assert answer.token_ids == token_ids, name
    for found, wanted in zip((answer.logprobs, answer.prompt_logprobs), logprobs, strict=True):
        assert not found or (torch.tensor(found) - wanted).abs().max() < TOLERANCE, name


@pytest.fixture(scope="module", params=[DENSE, MOE])
def served(request, tmp_path_factory) -> Iterator[Served]:
    """An engine, the second with chunks that end within an image."""
    folder = write_vision_checkpoint(tmp_path_factory.mktemp("vision"), member=request.param)
    reference = VisionReference(folder)
    expected = {}
    for name, (text, _) in PROMPTS.items():
        images = images_of(name)
        answer = reference.greedy(text, images, TOKENS)
        expected[name] = Expected(*answer, reference.prompt_logprobs(text, images))
    chunks = {"max_num_batched_tokens": 157} if request.param == MOE else {}
    engine = Offline(folder, **FLAGS, **chunks)
    yield Served(engine, expected)
    engine.close()


@pytest.mark.parametrize("k", range(5))
def test_any_number_of_drafts_gives_what_transformers_computes(served, k):
    """From none, the plain model, to all that the flags allow; each prompt alone, then all."""
    engine, name = served.engine, "vllm:spec_decode_num_accepted_tokens"
    engine.forget()
    engine.inside("draft", k)
    before = engine.counters().get(name, 0)
    if k == 3:
        for prompt in PROMPTS:
            check(served.expected, prompt, ask(engine, [prompt])[0])
        engine.forget()
    for prompt, answer in zip(PROMPTS, ask(engine, list(PROMPTS)), strict=True):
        check(served.expected, prompt, answer)
    assert (engine.counters().get(name, 0) > before) == (k > 0)


def test_an_image_is_found_in_the_cache(served):
    """Prompts whose log-probabilities are asked for never hit."""
    served.engine.forget()
    served.engine.inside("draft", 4)
    cold, warm = (
        ask(served.engine, [name], prompt_logprobs=None)[0] for name in ("long", "long-and-more")
    )
    assert cold.cached == 0 < warm.cached
    check(served.expected, "long", cold)
    check(served.expected, "long-and-more", warm)
