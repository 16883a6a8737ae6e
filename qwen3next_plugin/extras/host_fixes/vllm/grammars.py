"""Structured outputs, compiled and matched in processes of their own (`processes`)."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qwen3next_plugin.engines.vllm.names import is_ours
from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.extras.host_fixes import matchers, processes

FIELD = "structured_outputs (response_format, tools)"
SIMPLIFY = "simplify it, and lower minItems, maxItems and maxLength of a JSON schema"
COMPILERS = ThreadPoolExecutor(4, "grammar")  # they wait for processes
ENDED = "qwen3next_ended"  # of vLLM's manager: why, by request


@patch(
    When.GRAMMARS,
    "vllm.v1.executor.abstract.Executor.__init__",
    reason="one call of a grammar may take minutes, and nothing ends it but the end of its process",
    remove_when="the libraries of grammars limit the time and memory of each call",
    upstream="https://github.com/vllm-project/vllm/issues/54003",
)
@patch(
    When.CONFIGURED,
    "vllm.v1.engine.async_llm.AsyncLLM.__init__",
    reason="one call of a grammar may take minutes, and nothing ends it but the end of its process",
    remove_when="the libraries of grammars limit the time and memory of each call",
    upstream="https://github.com/vllm-project/vllm/issues/54003",
)
def fork_first(
    host: Callable[..., None], made: Any, vllm_config: Any, *rest: Any, **kw: Any
) -> None:
    """Around `AsyncLLM.__init__` and `Executor.__init__`, before there are weights and threads."""
    if is_ours(vllm_config.model_config):
        processes.start(vllm_config=vllm_config)
    host(made, vllm_config, *rest, **kw)


@patch(
    When.GRAMMARS,
    "vllm.v1.structured_output.StructuredOutputManager.grammar_init",
    reason="one call of a grammar may take minutes, and nothing ends it but the end of its "
    "process; and vLLM compiles one after another, all by the backend of the first",
    remove_when="the libraries of grammars limit the time and memory of each call, and vLLM "
    "takes a backend for each request (`compat`)",
    upstream="https://github.com/vllm-project/vllm/issues/43920",
)
def compile_apart(host: Callable[..., None], manager: Any, request: Any) -> None:
    """Around `grammar_init`: compile each text in its process, by the backend that checked it.

    vLLM compiles all by the backend of the first request with a grammar, one after another.
    """
    asked = request.structured_output_request
    here = not manager._use_async_grammar_compilation or not is_ours(
        manager.vllm_config.model_config
    )
    if asked is None or here:
        host(manager, request)
        return
    if manager.backend is None:
        manager.backend = Masks(manager.vllm_config.model_config.get_vocab_size())
    asked.grammar = COMPILERS.submit(_compile, manager, request)


def _compile(manager: Any, request: Any) -> "Constrained":
    ended = vars(manager).setdefault(ENDED, {})
    name = request.sampling_params.structured_outputs._backend
    stops = frozenset(request.sampling_params.all_stop_token_ids)
    text = (name, *request.structured_output_request.structured_output_key, stops)
    try:
        processes.first().call(0, backend, name)  # for all that are forked later
        return Constrained(matchers.Matcher(text, Grammar, *text), ended)
    except processes.OverBudgetError:
        ended[request.request_id] = f"{FIELD} {processes.EXCEEDED}: {SIMPLIFY}"
        raise
    except Exception as error:
        ended[request.request_id] = f"{FIELD}: {error}"
        raise


@patch(
    When.GRAMMARS,
    "vllm.v1.core.sched.scheduler.Scheduler.update_draft_token_ids",
    "vllm.v1.core.sched.scheduler.Scheduler.update_draft_token_ids_in_output",
    reason="vLLM asks one grammar after another, and each answer takes 0.16 ms",
    remove_when="grammars are matched in the engine's process",
)
def learn_drafts(host: Callable[..., Any], scheduler: Any, drafted: Any, *args: Any) -> Any:
    """Around `update_draft_token_ids`, `…_in_output`: ask all processes at once."""
    _learn(scheduler, drafted.req_ids, drafted.draft_token_ids)
    return host(scheduler, drafted, *args)


def _learn(scheduler: Any, names: Sequence[str], token_ids: Sequence[list[int]]) -> None:
    asked = []
    for name, tokens in zip(names, token_ids, strict=True):
        request = scheduler.requests.get(name)
        if request is not None and request.use_structured_output:
            grammar = request.structured_output_request.grammar
            if isinstance(grammar, Constrained):
                asked.append((grammar.matcher, tokens))
    matchers.ask_ahead(asked)


@patch(
    When.GRAMMARS,
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output",
    reason="vLLM has no reason of an error to go with a request's last output",
    remove_when="vLLM has one",
    upstream="https://github.com/vllm-project/vllm/issues/57725",
)
def say_why(host: Callable[..., Any], scheduler: Any, scheduled: Any, made: Any) -> Any:
    """Around `update_from_output`: add the reason why a request ended to its last output."""
    if made.sampled_token_ids:
        _learn(scheduler, made.req_ids, made.sampled_token_ids)
    outputs = host(scheduler, scheduled, made)
    if ended := vars(scheduler.structured_output_manager).get(ENDED):
        for each in outputs.values():
            for output in each.outputs:
                if output.finish_reason is not None:
                    output.stop_reason = ended.pop(output.request_id, output.stop_reason)
        for name in list(ended):  # a copy: compiling threads add to it
            if name not in scheduler.requests:
                del ended[name]
    return outputs


class Masks:
    """The parts of vLLM's backend other than grammars."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)

    def allocate_token_bitmask(self, rows: int) -> torch.Tensor:
        return torch.full((rows, self._words), -1, dtype=torch.int32)

    def destroy(self) -> None:
        """Nothing: the processes end with this one."""


class Constrained:
    """A request's grammar, as vLLM's `StructuredOutputGrammar`; over budget it allows all."""

    def __init__(self, matcher: matchers.Matcher, ended: dict[str, str]) -> None:
        self.matcher, self._ended, self._over = matcher, ended, False

    def _accept(self, tokens: Sequence[int]) -> int:
        try:
            return 0 if self._over else self.matcher.accept(tokens)
        except processes.OverBudgetError:
            self._over = True
            return 0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        accepted = self._accept(tokens)
        if self._over:
            self._ended[request_id] = f"{FIELD} {processes.TOO_DEAR}: {SIMPLIFY}"
            return False
        return accepted == len(tokens) or self.matcher.terminated

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        accepted = self._accept(tokens)
        self.rollback(accepted)
        return tokens[:accepted]

    def rollback(self, num_tokens: int) -> None:
        if not self._over:
            self.matcher.roll_back(num_tokens)

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        row = bitmask[batch_index].numpy()
        mask = np.frombuffer(self.matcher.mask, np.int32)[: len(row)]
        row[: len(mask)] = mask
        row[len(mask) :] = 0

    def is_terminated(self) -> bool:
        return self.matcher.terminated


def tokenizer(state: dict[str, Any]) -> None:
    """In the first process: load the tokenizer and libraries, which forked processes inherit."""
    import llguidance  # noqa: F401
    import outlines_core  # noqa: F401
    import xgrammar  # noqa: F401
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.v1.structured_output import (  # noqa: F401
        backend_guidance,
        backend_lm_format_enforcer,
        backend_outlines,
        backend_xgrammar,
    )

    # vLLM's limit is of wall time, so on busy cores it would end what our budget allows.
    os.environ.setdefault("VLLM_REGEX_COMPILATION_TIMEOUT_S", "0")
    if "tokenizer" not in state:
        logging.disable()  # of what a client may repeat
        model_config = state["vllm_config"].model_config
        state["tokenizer"] = cached_tokenizer_from_config(model_config=model_config)


def backend(state: dict[str, Any], name: str) -> None:
    """In the first process: make a backend, which forked processes inherit."""
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend
    from vllm.v1.structured_output.backend_lm_format_enforcer import LMFormatEnforcerBackend
    from vllm.v1.structured_output.backend_outlines import OutlinesBackend
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    if name in state:
        return
    tokenizer(state)
    made = {
        "xgrammar": XgrammarBackend,
        "guidance": GuidanceBackend,
        "outlines": OutlinesBackend,
        "lm-format-enforcer": LMFormatEnforcerBackend,
    }
    config = state["vllm_config"]
    vocab_size = config.model_config.get_vocab_size()
    state[name] = made[name](config, state["tokenizer"], vocab_size)


class Grammar:
    """One of vLLM's grammars, in its text's process."""

    def __init__(
        self, state: dict[str, Any], name: str, kind: Any, spec: str, stops: frozenset[int]
    ) -> None:
        made = state[name]
        self._grammar = made.compile_grammar(kind, spec, stop_token_ids=set(stops))
        self._row = made.allocate_token_bitmask(1)

    def accept(self, token: int) -> bool:
        return self._grammar.accept_tokens("", [token])

    def roll_back(self, count: int) -> None:
        self._grammar.rollback(count)

    def mask(self) -> bytes:
        if self._grammar.is_terminated():
            return b""
        self._grammar.fill_bitmask(self._row, 0)
        return self._row.numpy().tobytes()
