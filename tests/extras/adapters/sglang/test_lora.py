"""LoRA under SGLang: an adapter on the server equals its weights merged in transformers."""

import re
import urllib.error
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_greedy
from engines.lora import make_adapter, write_adapter
from engines.process import CPUS
from engines.sglang.server import NEXTN, Forked
from family import FAMILY
from needs import need
from quantised import MIXED, quantise
from reference import Reference
from tiers import long_except

pytestmark = pytest.mark.serve

SMALL = ("--dtype", "float32", "--max-total-tokens", "16384", "--max-mamba-cache-size", "40")
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}
PROMPTS = [random_prompt(n) for n in (3, 65, 130)]
INVARIANT = {"QWEN3NEXT_BATCH_INVARIANT": "1"}
TOKENS = 16
# Without v_proj, up_proj and in_proj_qkv, in_proj_b or their like: parts of a projection.
SOME = ("in_proj_z", "in_proj_a", "in_proj_ba", "q_proj", "k_proj", "gate_proj", "down_proj")


class Case(NamedTuple):
    """A checkpoint, of FAMILY or Qwen3-Next's, its server, and how an adapter's names begin."""

    member: str | None
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    prefixes: tuple[str, ...] = ("model.",)  # one after the other
    quantised: bool = False


DRAFTS = (*NEXTN, "3", "--chunked-prefill-size", "67")
IN_TURN = {"TEST_DRAFTS": "0,3,201"}  # plain steps, chains of one length and of several
MOE_4 = "moe_HV=4H_top-3-of-12_5-layers"
CASES = {
    "qwen3-next": Case(None),
    "qwen3-next-quantised-mtp": Case(None, DRAFTS, IN_TURN, quantised=True),
    "qwen3.5-dense-wrapped-mtp": Case(
        "dense_HV=3H_wrapped_7-layers",
        (*DRAFTS, "--language-model-only"),
        IN_TURN,
        ("model.language_model.", "model."),
    ),
    "qwen3.5-moe-mtp": Case(MOE_4, DRAFTS, IN_TURN),
    "qwen3.5-moe-trees": Case(
        MOE_4, (*NEXTN, "2", "--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "5")
    ),
    "qwen3.5-moe-mtp_two-ranks": Case(
        MOE_4, (*DRAFTS, "--tp-size", "2"), {"SGLANG_CPU_OMP_THREADS_BIND": f"{CPUS[0]}|{CPUS[-1]}"}
    ),
}
QUICK = {"qwen3-next-quantised-mtp", "qwen3.5-dense-wrapped-mtp"}


class Served(NamedTuple):
    """A server with two adapters, and what each is as one model; None: the base."""

    server: Forked
    models: dict[str | None, Reference]
    adapter: Path


@pytest.fixture(scope="module", params=long_except(QUICK, CASES))
def served(request, tmp_path_factory) -> Iterator[Served]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("lora")
    if "two-ranks" in request.param:
        need("two-cores")
    model = folder / "model"
    model = FAMILY[case.member].write(model) if case.member else write_checkpoint(model)
    read = model
    if case.quantised:
        model, _, read = quantise(model, folder, MIXED)
    models = {name: Reference(read) for name in (None, "all", "some")}
    whole = make_adapter(folder / "all", models["all"], case.prefixes)
    some = make_adapter(
        folder / "some", models["some"], case.prefixes, rank=6, targets=SOME, rslora=True
    )
    paths = ("--lora-paths", f"all={whole}", f"some={some}")
    server = Forked(model, *SMALL, *case.flags, *paths, env=dict(case.env)).wait()
    yield Served(server, models, whole)
    server.close()


def test_adapters_in_one_batch_equal_merged_weights(served):
    """Beside the base model, each with the same prompts; none hits another's prefix."""
    names = [name for name in served.models for _ in PROMPTS]
    prompts = PROMPTS * len(served.models)
    for warm in (False, True):
        answers = served.server.greedy(prompts, TOKENS, lora_path=names, **LOGPROBS)
        for name, model in served.models.items():
            mine = [i for i, other in enumerate(names) if other == name]
            check_greedy(model, PROMPTS, [answers[i] for i in mine])
        if not warm:
            assert not any(answer.cached for answer in answers)
    assert len({answer.token_ids for answer in answers[2 :: len(PROMPTS)]}) == len(served.models)


def test_a_cached_prefix_is_its_adapters_own(served):
    for name, model in served.models.items():
        (first,) = served.server.greedy([PROMPTS[2]], TOKENS, lora_path=name)
        turn = PROMPTS[2] + first.token_ids + random_prompt(5, seed=2)
        (answer,) = served.server.greedy([turn], TOKENS, lora_path=name, return_logprob=True)
        assert answer.cached >= len(PROMPTS[2])
        check_greedy(model, [turn], [answer])


def test_a_model_names_its_adapter(served):
    """As OpenAI's clients do; the texts differ as the adapters do."""
    texts = []
    for suffix, name in (("", None), (":all", "all"), (":some", "some")):
        (answer,) = served.server.greedy([PROMPTS[1]], TOKENS, lora_path=name)
        asked = served.server.client.completions.create(
            model=served.server.model + suffix,
            prompt=list(PROMPTS[1]),
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert asked.choices[0].text == answer.text
        texts.append(answer.text)
    assert len(set(texts)) == len(texts)


def test_adapters_are_loaded_and_unloaded_while_it_serves(served, tmp_path):
    """One whose parts do not all fit is refused by name, and the server goes on."""
    tensors = load_file(served.adapter / "adapter_model.safetensors")
    server = served.server
    stray = {name.replace(".layers.0.", ".layers.99."): t for name, t in tensors.items()}
    other = write_adapter(tmp_path / "other", stray, ["out_proj"])
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        server.post("/load_lora_adapter", lora_name="other", lora_path=str(other))
    assert re.search(r"layers\.99\..*: no adapter is served there", refused.value.read().decode())
    server.post("/unload_lora_adapter", lora_name="all")
    server.post("/load_lora_adapter", lora_name="again", lora_path=str(served.adapter))
    (answer,) = server.greedy(PROMPTS[:1], TOKENS, lora_path="again", **LOGPROBS)
    check_greedy(served.models["all"], PROMPTS[:1], [answer])


def test_a_server_that_begins_without_adapters(tmp_path):
    """It takes one of the ranks that --max-lora-rank allows."""
    model = write_checkpoint(tmp_path / "model")
    merged, unused = Reference(model), Reference(model)
    path = str(make_adapter(tmp_path / "all", merged))
    wide = str(make_adapter(tmp_path / "wide", unused, rank=9))
    flags = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all")
    server = Forked(model, *SMALL, *flags).wait()
    try:
        server.post("/load_lora_adapter", lora_name="all", lora_path=path)
        (answer,) = server.greedy(PROMPTS[1:2], TOKENS, lora_path="all", **LOGPROBS)
        check_greedy(merged, PROMPTS[1:2], [answer])
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            server.post("/load_lora_adapter", lora_name="wide", lora_path=wide)
        assert "--max-lora-rank" in refused.value.read().decode()
    finally:
        server.close()


def test_an_adapters_bits_do_not_depend_on_the_batch(tmp_path):
    """In bf16, beside other requests or alone, and in steps with and without drafts."""
    model = FAMILY[MOE_4].write(tmp_path / "model")
    path = make_adapter(tmp_path / "all", Reference(model))
    flags = ("--dtype", "bfloat16", *SMALL[2:], *NEXTN, "3", "--lora-paths", f"all={path}")
    server = Forked(model, *flags, env=IN_TURN | INVARIANT).wait()
    try:
        names = ["all", None, "all"]
        together = server.greedy(PROMPTS, TOKENS, lora_path=names, **LOGPROBS)
        for i, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True)):
            server.forget()
            (alone,) = server.greedy([prompt], TOKENS, lora_path=name, **LOGPROBS)
            assert (alone.token_ids, alone.logprobs) == (
                together[i].token_ids,
                together[i].logprobs,
            )
            assert alone.prompt_logprobs == together[i].prompt_logprobs
    finally:
        server.close()
