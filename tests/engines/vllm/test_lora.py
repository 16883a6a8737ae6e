"""LoRA on the projections: an adapter on the server equals its weights merged in transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_greedy
from engines.lora import TARGETS, make_adapter
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from family import FAMILY
from reference import Reference
from tiers import long_except

DRAFTS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}

pytestmark = pytest.mark.serve


class Case(NamedTuple):
    """A checkpoint, of FAMILY or Qwen3-Next's, its flags, and how an adapter's names begin."""

    member: str | None
    flags: Mapping[str, Any]
    prefixes: tuple[str, ...] = ("model.",)  # one after the other


WRAPPED = Case(
    "dense_HV=3H_wrapped_7-layers",
    DRAFTS | {"language_model_only": True},
    prefixes=("model.language_model.", "model."),
)
COMPILED = "qwen3.5-dense-wrapped-mtp_compiled"  # with --long
CASES = {
    "qwen3-next": Case(None, {}),
    "qwen3.5-moe-mtp": Case("moe_HV=4H_top-3-of-12_5-layers", DRAFTS),
    "qwen3.5-dense-wrapped-mtp": WRAPPED,
    COMPILED: WRAPPED._replace(flags=WRAPPED.flags | {"enforce_eager": False}),
}


@pytest.mark.parametrize("name", long_except(CASES.keys() - {COMPILED}, CASES))
def test_adapter_equals_merged_weights(tmp_path: Path, name: str) -> None:
    """Text and log-probabilities with the adapter are the merged model's; without it, the base's.

    Neither hits the other's prefix in the cache.
    """
    case, folder = CASES[name], tmp_path / "model"
    model = FAMILY[case.member].write(folder) if case.member else write_checkpoint(folder)
    plain, merged = Reference(model), Reference(model)
    adapter = make_adapter(tmp_path / "adapter", merged, case.prefixes)
    engine = Offline(model, dtype="float32", enable_lora=True, max_model_len=2048, **case.flags)
    try:
        prompts = [random_prompt(n) for n in (3, 65, engine.cache()["block_size"] + 9)]
        for reference, params in ((merged, {"adapter": str(adapter)}), (plain, {})):
            outputs = engine.greedy(prompts, 12, **LOGPROBS, **params)
            check_greedy(reference, prompts, outputs)
            assert not any(output.cached for output in outputs)
    finally:
        engine.close()


@pytest.mark.parametrize("targets", [TARGETS, ("in_proj_ba",), ("q_proj", "up_proj")], ids=str)
def test_an_adapter_beside_packed_weights(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """In bf16, where weights are packed, each of its parts has its effect."""
    model = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    plain, merged = Reference(model), Reference(model)
    adapter = make_adapter(tmp_path / "adapter", merged, targets=targets)
    prompt = random_prompt(200)
    engine = Offline(model, dtype="bfloat16", enable_lora=True, max_model_len=2048)
    try:
        (output,) = engine.greedy([prompt], 1, adapter=str(adapter), **LOGPROBS)
    finally:
        engine.close()
    before, wanted = plain.prompt_logprobs(prompt), merged.prompt_logprobs(prompt)
    error = (torch.tensor(output.prompt_logprobs) - wanted).abs().mean()
    assert error < 0.2 * (wanted - before).abs().mean()
