"""Quantised checkpoints of Qwen4-Exp under SGLang, compared with transformers."""

import pytest

from checkpoints import write_tokenizer
from engines.checks import TOKENS, check_greedy
from engines.sglang.server import FIXED, NEXTN, Forked
from extras.qwen4_exp.model import StreamsReference
from extras.qwen4_exp.quantised import IN_PANELS, PROMPTS, write_kind, write_split
from quantised import AT_LOAD, KINDS, MIXED
from tiers import long_except

pytestmark = pytest.mark.serve

LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}
FLAGS = {
    "--dtype": "float32",
    "--max-total-tokens": "16384",
    "--max-mamba-cache-size": "40",
    "--chunked-prefill-size": "257",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("kind", long_except([IN_PANELS], (MIXED, IN_PANELS, *AT_LOAD, *KINDS)))
def test_with_drafts(plain, tmp_path, kind):
    """Also with tables in FP8, if the files are quantised."""
    served, env, twin = write_kind(plain, tmp_path, kind)
    write_tokenizer(served)
    flags = (word for pair in FLAGS.items() for word in pair)
    server = Forked(served, *flags, *NEXTN, "3", env=env | FIXED)
    try:
        outputs = server.wait().greedy(PROMPTS, TOKENS, **LOGPROBS)
    finally:
        server.close()
    check_greedy(StreamsReference(twin), PROMPTS, outputs)
    assert sum(output.accepted for output in outputs) > 0
