"""In bf16 SGLang has the bits of vLLM and transformers, with and without drafts."""

from typing import Any

import pytest

from engines.bits import INVARIANT
from engines.recomputed import check_recomputed
from engines.sglang.server import NEXTN, Answer, Forked
from engines.three import TOKENS
from engines.three import served as served
from tiers import long_except

pytestmark = pytest.mark.serve

FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "8192", "--chunked-prefill-size", "257")
LOGPROBS: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}


@pytest.mark.parametrize("drafts", long_except([3], [0, 3]))
def test_what_transformers_recomputes(served, drafts):
    folder, prompts, wrapped = served
    more = (*NEXTN, str(drafts)) if drafts else ()
    more += ("--language-model-only",) if wrapped else ()
    server = Forked(folder, *FLAGS, *more, env=INVARIANT).wait()
    try:
        found = server.greedy(prompts, TOKENS, **LOGPROBS)
        params = {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True}
        asked = {"input_ids": list(map(list, prompts)), "sampling_params": params, **LOGPROBS}
        found += [Answer.of(each, **LOGPROBS) for each in server.post("/generate", **asked)]
    finally:
        server.close()
    check_recomputed(folder, [*prompts, *prompts], found)
