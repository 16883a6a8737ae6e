"""What users report of vLLM's own Qwen3.5 with MTP, as far as a CPU shows it; ours beside it."""

from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.vllm.checks import check_cache_hits
from engines.vllm.offline import Offline
from engines.vllm.test_memory import RELEASED
from family import FAMILY, Member
from reference import Reference

pytestmark = [pytest.mark.serve, pytest.mark.long]

MTP = {"method": "mtp", "num_speculative_tokens": 3}
UPSTREAM = {"QWEN3NEXT_DISABLE": "1"}


def test_prefix_caching_with_mtp(tmp_path: Path) -> None:
    """vllm #53912: on a CPU the engine ends at its first request."""
    model = FAMILY["moe_HV=4H_top-3-of-12_5-layers"].write(tmp_path)
    flags: dict[str, Any] = {"max_model_len": 2048, "speculative_config": MTP}
    upstream = Offline(model, env=UPSTREAM, dtype="bfloat16", **flags)
    try:
        with pytest.raises(AssertionError, match="'function' object is not subscriptable"):
            upstream.greedy([random_prompt(700)], 8)
    finally:
        upstream.close()
    engine = Offline(model, dtype="float32", **flags)
    try:
        prompts = [random_prompt(n, seed=3) for n in (700, 1000)]
        check_greedy(Reference(model), prompts, check_cache_hits(engine, prompts))
    finally:
        engine.close()


def concurrency(model: Path, env: dict[str, str], drafts: dict[str, Any] | None) -> float:
    """Requests of 4,096 tokens that fit in 1 GiB, as vLLM counts them."""
    engine = Offline(
        model,
        env=env,
        dtype="bfloat16",
        mamba_ssm_cache_dtype="float32",  # ours; upstream's default is bfloat16
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,  # upstream ends with it, see above
        speculative_config=drafts,
    )
    try:
        return engine.inside("concurrency")
    finally:
        engine.close()


def test_requests_at_once_with_mtp(tmp_path: Path) -> None:
    """vllm #55533: upstream, each draft takes a state of every linear layer from the pool."""
    model = Member(RELEASED | {"num_hidden_layers": 40}).write(tmp_path)  # as Qwen3.5-35B-A3B
    found = {
        (side, drafts): concurrency(model, env, MTP if drafts else None)
        for side, env in {"plugin": {}, "upstream": UPSTREAM}.items()
        for drafts in (False, True)
    }
    assert found["upstream", True] < 0.4 * found["upstream", False]
    assert found["plugin", True] > 0.7 * found["plugin", False]
    assert found["plugin", True] > 2 * found["upstream", True]
