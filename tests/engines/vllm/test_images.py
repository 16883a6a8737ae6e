"""vLLM's vision tower around our text model: answers about images are transformers'."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.checks import TOLERANCE, Output, check_no_farther
from engines.images import (
    check_a_video_in_a_chat,
    check_an_image_in_a_chat,
    check_hostile_images,
)
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from engines.vllm.server import Forked
from family import FAMILY
from needs import needs
from tiers import long_except
from vision import (
    PLACE,
    VIDEO_PLACE,
    VisionReference,
    about,
    random_image,
    random_video,
    write_vision_checkpoint,
)

pytestmark = pytest.mark.serve

TOKENS = 16
BIAS = "visual.blocks.0.attn.proj.bias"
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


class Model(NamedTuple):
    """A checkpoint, and transformers' answers to each prompt."""

    folder: Path
    reference: VisionReference
    expected: dict[str, Expected]


class Served(NamedTuple):
    folder: Path
    engine: Offline
    expected: dict[str, Expected]


def images_of(name: str) -> list:
    return [random_image(*size, seed=i) for i, size in enumerate(PROMPTS[name][1])]


def prompt_of(name: str) -> dict[str, Any]:
    return {"prompt": PROMPTS[name][0], "multi_modal_data": {"image": images_of(name)}}


def ask(engine: Offline, names: list[str], **params: Any) -> list[Output]:
    """The answers to prompts, all asked at once."""
    return engine.greedy([prompt_of(name) for name in names], TOKENS, **LOGPROBS | params)


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors")


def check(expected: dict[str, Expected], name: str, answer: Output) -> None:
    token_ids, *logprobs = expected[name]
    assert answer.token_ids == token_ids, name
    for found, wanted in zip((answer.logprobs, answer.prompt_logprobs), logprobs, strict=True):
        assert found is None or (torch.tensor(found) - wanted).abs().max() < TOLERANCE, name


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Callable[[str], Model]:
    """A checkpoint of the family; each is written once."""

    @cache
    def make(member: str) -> Model:
        folder = write_vision_checkpoint(tmp_path_factory.mktemp("vision"), member=member)
        reference = VisionReference(folder)
        expected = {}
        for name, (text, _) in PROMPTS.items():
            images = images_of(name)
            answer = reference.greedy(text, images, TOKENS)
            expected[name] = Expected(*answer, reference.prompt_logprobs(text, images))
        return Model(folder, reference, expected)

    return make


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (DENSE, {}),
    # Chunks that end within an image, of 8 tokens while anyone waits.
    "moe_chunks-of-157": (
        MOE,
        {"max_num_batched_tokens": 157, "env": {"QWEN3NEXT_STEP_SECONDS": "0.000001"}},
    ),
    "moe_compiled": (MOE, {"enforce_eager": False}),
}


@pytest.fixture(scope="module", params=long_except(("dense", "moe_chunks-of-157"), CASES))
def served(request, model) -> Iterator[Served]:
    member, flags = CASES[request.param]
    folder, _, expected = model(member)
    engine = Offline(folder, **FLAGS, **flags)
    yield Served(folder, engine, expected)
    engine.close()


@pytest.mark.parametrize("num_drafts", long_except((0, 2, 4), range(5)))
def test_any_number_of_drafts_gives_what_transformers_computes(served, num_drafts):
    """From none, the plain model, to all that the flags allow; each prompt alone, then all."""
    engine, name = served.engine, "vllm:spec_decode_num_accepted_tokens"
    engine.forget()
    engine.inside("draft", num_drafts)
    before = engine.counters().get(name, 0)
    if num_drafts == 3:
        for prompt in PROMPTS:
            check(served.expected, prompt, ask(engine, [prompt])[0])
        engine.forget()
    for prompt, answer in zip(PROMPTS, ask(engine, list(PROMPTS)), strict=True):
        check(served.expected, prompt, answer)
    assert (engine.counters().get(name, 0) > before) == (num_drafts > 0)


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


@pytest.mark.parametrize("by_reload", [False, True], ids=["preempted", "reloaded"])
def test_an_image_of_the_cache_is_computed_again(served, by_reload):
    """What a worker never got, because the prefix cache had it."""
    engine, folder = served.engine, served.folder
    engine.forget()
    engine.inside("draft", 4)
    check(served.expected, "long", ask(engine, ["long"], prompt_logprobs=None)[0])
    reload_from = str(folder) if by_reload else ""
    found = engine.inside("interrupted", prompt_of("long"), TOKENS, reload_from=reload_from)
    assert tuple(found) == served.expected["long"].token_ids
    check(served.expected, "long", ask(engine, ["long"], prompt_logprobs=None)[0])


def test_another_tower_is_not_loaded(served, tmp_path):
    wrong = Path(shutil.copytree(served.folder, tmp_path / "wrong"))
    change(wrong, lambda tensors: tensors.pop(f"model.{BIAS}"))
    with pytest.raises(AssertionError, match=rf"{BIAS} is missing: download"):
        served.engine.inside("reload", str(wrong))
    check(served.expected, "one", ask(served.engine, ["one"])[0])


def test_a_tower_in_part_is_refused(model, tmp_path):
    part = Path(shutil.copytree(model(DENSE).folder, tmp_path / "part"))
    change(part, lambda tensors: tensors.pop(f"model.{BIAS}"))
    with pytest.raises(AssertionError, match=rf"1 tensors of the vision tower .* is {BIAS}: "):
        Offline(part, **FLAGS)


@pytest.mark.long
@needs("two-cores")
@pytest.mark.parametrize("member", [DENSE, MOE])
def test_two_ranks(model, member):
    folder, _, expected = model(member)
    fixed = {"QWEN3NEXT_DRAFTS": "fixed"}
    engine = Offline(folder, env=fixed, tensor_parallel_size=2, **FLAGS)
    try:
        answers = ask(engine, list(PROMPTS))
        accepted = engine.counters()["vllm:spec_decode_num_accepted_tokens"]
    finally:
        engine.close()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        check(expected, prompt, answer)
    assert accepted > 0


@pytest.mark.long
@pytest.mark.parametrize("member", [DENSE, MOE])
def test_bf16_is_as_near_as_transformers(model, member):
    folder, _, expected = model(member)
    engine = Offline(folder, **FLAGS | {"dtype": "bfloat16"})
    try:
        answers = ask(engine, list(PROMPTS))
    finally:
        engine.close()
    theirs = VisionReference(folder, torch.bfloat16)
    check_no_farther(
        [answer.prompt_logprobs for answer in answers],
        [theirs.prompt_logprobs(PROMPTS[name][0], images_of(name)) for name in PROMPTS],
        [expected[name].prompt_logprobs for name in PROMPTS],
    )


def test_videos(model):
    """Several in a batch; drafts follow a video's positions, too."""
    folder, reference, _ = model(DENSE)
    videos = [random_video(frames, 96, 64) for frames in (2, 4, 6)]
    text = f"def describe({VIDEO_PLACE}):"
    engine = Offline(folder, env={"QWEN3NEXT_DRAFTS": "fixed"}, **FLAGS)
    try:
        answers = engine.greedy(
            [{"prompt": text, "multi_modal_data": {"video": [(v, _metadata(v))]}} for v in videos],
            TOKENS,
            logprobs=0,
        )
        accepted = engine.counters()["vllm:spec_decode_num_accepted_tokens"]
    finally:
        engine.close()
    for video, answer in zip(videos, answers, strict=True):
        token_ids, logprobs = reference.greedy(text, [], TOKENS, [video])
        assert answer.token_ids == token_ids
        assert (torch.tensor(answer.logprobs) - logprobs).abs().max() < TOLERANCE
    assert accepted > 0


def _metadata(video: Any) -> dict[str, Any]:
    return about(video) | {"video_backend": "opencv", "do_sample_frames": False}


def test_images_and_videos_in_chats(model):
    folder, reference, _ = model(DENSE)
    flags = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")
    more = ("--media-io-kwargs", '{"video": {"fps": 2}}')  # of a video that is a list of frames
    drafts = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}')
    server = Forked(folder, *flags, *more, *drafts, env={"QWEN3NEXT_DRAFTS": "fixed"}).wait()
    try:
        check_an_image_in_a_chat(server, reference)
        check_hostile_images(server, reference)
        check_a_video_in_a_chat(server, reference)
        assert server.metrics()["vllm:spec_decode_num_accepted_tokens_total"] > 0
    finally:
        server.close()


def test_a_drafter_on_a_gpu_reads_images_as_the_trunk_does():
    """vLLM's own loop hands it the vectors of images, and masks where they go."""
    from vllm.model_executor.models.interfaces import supports_multimodal_embeddings

    from qwen3next_plugin.engines.vllm.model.mtp import Qwen3NextMTP

    assert supports_multimodal_embeddings(Qwen3NextMTP)
    table = torch.randn(50, 8)
    drafter = SimpleNamespace(model=SimpleNamespace(embed_input_ids=table.__getitem__))
    ids = torch.tensor([3, 49, 49, 7, 49, 2])
    images = [torch.randn(2, 8), torch.randn(1, 8)]
    found = Qwen3NextMTP.embed_input_ids(drafter, ids, images, is_multimodal=ids == 49)
    assert torch.equal(found, torch.stack([table[3], *images[0], table[7], *images[1], table[2]]))
    assert torch.equal(Qwen3NextMTP.embed_input_ids(drafter, ids), table[ids])
    assert torch.equal(Qwen3NextMTP.embed_input_ids(drafter, ids, []), table[ids])
