"""Grammars in processes of their own: how often SGLang's steps wait for them."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from qwen3next_plugin.engines.sglang.speculation.stops import end_with_the_grammar
from qwen3next_plugin.extras.host_fixes import matchers, processes
from qwen3next_plugin.extras.host_fixes.sglang import grammars


class Anything:
    """Allows each of the first 64 tokens, at all times."""

    def __init__(self, state: dict[str, Any]) -> None:
        pass

    def accept(self, token: int) -> bool:
        return True

    def roll_back(self, count: int) -> None:
        pass

    def mask(self) -> bytes:
        return bytes([255] * 8)


def request(text: str) -> SimpleNamespace:
    grammar = grammars.constrained_type()(matchers.Matcher(text, Anything))
    return SimpleNamespace(
        grammar=grammar, finished=lambda: False, is_retracted=False, inflight_middle_chunks=0
    )


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "not ahead"])
def test_a_plain_step_asks_all_processes_at_once(ahead):
    """So each token is known when it is read, although its process has ended by then.

    Where nothing is asked ahead, each request fails, as this test would notice.
    """
    processes.start()
    reqs = [request(text) for text in ("one", "one", "other")]
    batch = SimpleNamespace(
        reqs=reqs,
        has_grammar=True,
        forward_mode=ForwardMode.DECODE,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    result = SimpleNamespace(
        next_token_ids=torch.tensor([1, 2, 3]),
        accept_lens=None,
        copy_done=None,
        grammar_advanced=False,
    )

    def read_token(req: Any, token: int) -> None:
        req.grammar.matcher.process.end()
        req.grammar.accept_token(token)

    def of_host(processor: Any, result: Any, batch: Any) -> None:
        """Leaves plain steps as they are."""

    processor = SimpleNamespace(_accept_grammar_tokens=read_token)
    advance = partial(grammars.learn_accepted, of_host) if ahead else of_host
    processor.advance_grammar_fsm = partial(advance, processor)
    end_with_the_grammar(lambda processor, batch, result: None, processor, batch, result)
    assert [req.grammar.failed is None for req in reqs] == [ahead] * len(reqs)
    assert result.grammar_advanced
