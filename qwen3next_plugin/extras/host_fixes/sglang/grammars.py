"""Grammars, compiled and matched in processes of their own (`processes`)."""

import functools
import logging
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import numpy as np
import torch

from qwen3next_plugin.engines.sglang.names import serves_ours
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.host_fixes import matchers, processes

FIELD = "the grammar (response_format, tools, json_schema, regex, ebnf)"
SIMPLIFY = "simplify it, and lower minItems, maxItems and maxLength of a JSON schema"
DEAR = f"{FIELD} {processes.TOO_DEAR}: {SIMPLIFY}"


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler.Scheduler.init_tokenizer",
    reason="one call of a grammar may take minutes, and nothing ends it but the end of its process",
    remove_when="the libraries of grammars limit the time and memory of each call",
)
def fork_first(host: Callable[[Any], None], scheduler: Any) -> None:
    """Around `Scheduler.init_tokenizer`: fork after it, before weights are loaded."""
    host(scheduler)
    if serves_ours():
        config = scheduler.model_config
        processes.start(
            made_of=(scheduler.server_args, scheduler.tokenizer),
            vocab_size=config.vocab_size,
            stops=config.hf_eos_token_id,
        )


@patch(
    When.WITH_OURS,
    "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend._init_value_dispatch",
    reason="one call of a grammar may take minutes, and nothing ends it but the end of its process",
    remove_when="the libraries of grammars limit the time and memory of each call",
)
def compile_apart(host: Callable[..., Any], backend: Any, key: Any, require_reasoning: bool) -> Any:
    """Around `BaseGrammarBackend._init_value_dispatch`: compile each text in its process."""
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

    if not processes.started():
        return host(backend, key, require_reasoning)
    try:
        processes.first().call(0, make_backend)  # for all that are forked later
        return constrained_type()(matchers.Matcher(key, Grammar, key))
    except processes.OverBudgetError:
        return InvalidGrammarObject(f"it {processes.EXCEEDED}: {SIMPLIFY}")
    except ValueError as error:
        return InvalidGrammarObject(str(error))


@patch(
    When.WITH_OURS,
    "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend.set_cache",
    reason="SGLang keeps every grammar that a client ever sent",
    remove_when="its cache has a bound",
    upstream="https://github.com/sgl-project/sglang/pull/22196",
)
def keep_nothing(host: Callable[..., None], backend: Any, key: Any, value: Any) -> None:
    """Around `BaseGrammarBackend.set_cache`, which is unbounded: cache processes instead."""
    if not processes.started():
        host(backend, key, value)


def _constrained(req: Any) -> "Constrained | None":
    """A request's grammar, which a reasoning parser's grammar may wrap."""
    grammar = getattr(req.grammar, "grammar", req.grammar)
    return grammar if isinstance(grammar, Constrained) else None


def failure(req: Any) -> str | None:
    """The error of a request's grammar."""
    grammar = _constrained(req)
    return None if grammar is None else grammar.failed


@patch(
    When.WITH_OURS,
    "sglang.srt.speculative.spec_utils.generate_token_bitmask",
    reason="SGLang asks grammars token after token, and each answer takes 0.16 ms",
    remove_when="grammars are matched in the scheduler's process",
)
def learn_drafts(
    host: Callable[..., Any], reqs: Any, following: Any, siblings: Any, drafts: Any, vocab_size: int
) -> Any:
    """Around `generate_token_bitmask`: ask all processes at once, by the first drafts of trees."""
    chains = map(_chain, following.tolist(), drafts.tolist())
    _learn(reqs, chains)
    return host(reqs, following, siblings, drafts, vocab_size)


def _chain(following: list[int], tokens: list[int]) -> list[int]:
    """A tree's first draft, that draft's first child, and so on."""
    chain, place = [], following[0]
    while place >= 0:
        chain.append(tokens[place])
        place = following[place]
    return chain


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor.advance_grammar_fsm",
    reason="SGLang asks grammars token after token, and each answer takes 0.16 ms",
    remove_when="grammars are matched in the scheduler's process",
)
def learn_accepted(host: Callable[..., None], processor: Any, result: Any, batch: Any) -> None:
    """Around `advance_grammar_fsm`: ask all processes at once about a decode step's tokens."""
    if batch.forward_mode.is_decode() and batch.has_grammar and not result.grammar_advanced:
        if result.copy_done is not None:
            result.copy_done.synchronize()
        tokens = result.next_token_ids.tolist()
        if result.accept_lens is None:  # a plain step
            stride, lengths = 1, [1] * len(tokens)
        else:
            stride = result.speculative_output_stride or result.speculative_num_draft_tokens
            lengths = result.accept_lens.tolist()
        begins = count(step=stride)
        _learn(batch.reqs, (tokens[i : i + n] for i, n in zip(begins, lengths, strict=False)))
    host(processor, result, batch)


def _learn(reqs: Any, token_ids: Iterable[list[int]]) -> None:
    asked = []
    for req, tokens in zip(reqs, token_ids, strict=False):  # rows may be padded
        found = None if req.finished() else _constrained(req)
        if found is not None and not found.failed:
            asked.append((found.matcher, tokens))
    matchers.ask_ahead(asked)


@patch(
    When.WITH_OURS,
    "sglang.srt.constrained.grammar_manager.GrammarManager.get_ready_grammar_requests",
    reason="ranks that time a grammar, each for itself, may disagree",
    remove_when="the libraries of grammars limit the time and memory of each call",
)
def refuse_together(host: Callable[[Any], list[Any]], manager: Any) -> list[Any]:
    """Around `get_ready_grammar_requests`: refuse a request if any rank does."""
    ready = host(manager)
    if processes.started():
        for req in ready:
            refused = req.to_finish is not None
            if of_any_rank(refused) and not refused:
                req.set_finish_with_abort(f"{FIELD} {processes.EXCEEDED}: {SIMPLIFY}")
    return ready


def ranks() -> Any:
    """The tensor-parallel ranks."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_group


def of_any_rank(value: bool) -> bool:
    """Whether `value` is true on any tensor-parallel rank; their clocks differ."""
    group = ranks()
    if group.world_size == 1:
        return value
    said = torch.tensor([int(value)])
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group.cpu_group)
    return bool(said)


@functools.cache
def constrained_type() -> Any:
    """`Constrained` with SGLang's base class, which is imported late."""
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject

    return type("Constrained", (Constrained, BaseGrammarObject), {})


class Constrained:
    """A request's grammar, as SGLang's `BaseGrammarObject`; after a failure it allows every token.

    It never raises, because a rank that ends a request alone leaves the others waiting.
    """

    def __init__(self, matcher: matchers.Matcher) -> None:
        super().__init__()
        self.matcher = matcher
        self.failed: str | None = None

    def accept_token(self, token: int) -> None:
        self.current_token = token
        if self.failed or self.matcher.terminated:
            return
        try:
            if not self.matcher.accept([token]):
                self.failed = f"{FIELD} allows no token {token} here"
        except processes.OverBudgetError:
            self.failed = DEAR

    def rollback(self, k: int) -> None:
        if not self.failed:
            self.matcher.roll_back(k)

    def is_terminated(self) -> bool:
        return not self.failed and self.matcher.terminated

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: Any) -> torch.Tensor:
        return torch.full((batch_size, -(-vocab_size // 32)), -1, dtype=torch.int32)

    def fill_vocab_mask(self, vocab_mask: torch.Tensor, idx: int) -> None:
        if self.failed:
            vocab_mask[idx] = -1
            return
        row = vocab_mask[idx].numpy()
        mask = np.frombuffer(self.matcher.mask, np.int32)[: len(row)]
        row[: len(mask)] = mask
        row[len(mask) :] = 0

    @staticmethod
    def reset_vocab_mask(vocab_mask: torch.Tensor) -> None:
        vocab_mask.fill_(-1)

    @staticmethod
    def move_vocab_mask(vocab_mask: torch.Tensor, device: Any) -> torch.Tensor:
        return vocab_mask.to(device, non_blocking=True)

    def apply_vocab_mask(self, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

        XGrammarGrammar.apply_vocab_mask(self, logits, vocab_mask)


def make_backend(state: dict[str, Any]) -> None:
    """In the first process: make the backend, which forked processes inherit."""
    from sglang.srt.constrained.base_grammar_backend import create_grammar_backend

    if "backend" not in state:
        logging.disable()  # of what a client may repeat
        sizes = state["vocab_size"], state["stops"]
        state["backend"] = create_grammar_backend(*state["made_of"], *sizes)


class Grammar:
    """One of SGLang's grammars, in its text's process."""

    def __init__(self, state: dict[str, Any], key: tuple[str, str]) -> None:
        from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

        if "compiled" not in state:
            state["compiled"] = state["backend"]._init_value_dispatch(key, False)
        made = state["compiled"]
        if made is None or isinstance(made, InvalidGrammarObject):
            raise ValueError(made.error_message if made else f"no {key[0]} here")
        self._grammar = made.copy()
        self._row = self._grammar.allocate_vocab_mask(state["vocab_size"], 1, "cpu")

    def accept(self, token: int) -> bool:
        try:
            self._grammar.accept_token(token)
        except ValueError:
            return False
        return True

    def roll_back(self, count: int) -> None:
        self._grammar.rollback(count)

    def mask(self) -> bytes:
        if self._grammar.is_terminated():
            return b""
        self._grammar.fill_vocab_mask(self._row, 0)
        return self._row.numpy().tobytes()
