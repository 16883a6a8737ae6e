"""Checks of structured outputs beside the event loop, in processes with limits."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.extras.host_fixes import processes
from qwen3next_plugin.extras.host_fixes.vllm.grammars import FIELD, SIMPLIFY, tokenizer

AT_ONCE, WAITING, KEPT = 2, 16, 16  # results are kept with their texts, which may be large
BUSY = f"{AT_ONCE} {FIELD} are being checked, and {WAITING} wait: try again later"
PARAMETER = "structured_outputs"
CHECKS = "qwen3next_checks"  # of vLLM's AsyncLLM
_checked: ContextVar[Any] = ContextVar("checked", default=None)


@patch(
    When.CONFIGURED,
    "vllm.v1.engine.async_llm.AsyncLLM.add_request",
    reason="a schema of a hundred bytes takes minutes, or all memory, to check, in the process "
    "that answers all clients",
    remove_when="the libraries of grammars limit the time and memory of each call",
    upstream="https://github.com/vllm-project/vllm/pull/45172",
)
async def check_beside(
    host: Callable[..., Any],
    llm: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *rest: Any,
    **kw: Any,
) -> Any:
    """Around `AsyncLLM.add_request`: check in another process first; the event loop goes on."""
    outputs = getattr(params, "structured_outputs", None)
    asked = outputs is not None and not outputs.all_constraints_none()
    if asked and processes.started():
        if CHECKS not in vars(llm):
            vars(llm)[CHECKS] = Checks()
        params.structured_outputs = await vars(llm)[CHECKS].result(outputs)
        _checked.set(params.structured_outputs)
    return await host(llm, request_id, prompt, params, *rest, **kw)


@patch(
    When.CONFIGURED,
    "vllm.sampling_params.SamplingParams._validate_structured_outputs",
    reason="`check_beside` has checked it",
    remove_when="`check_beside` is removed",
)
def skip_checked(host: Callable[..., None], params: Any, *configs: Any) -> None:
    """Around `SamplingParams._validate_structured_outputs`, for those of `check_beside`."""
    if params.structured_outputs is None or params.structured_outputs is not _checked.get():
        host(params, *configs)


@patch(
    When.CONFIGURED,
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs",
    reason="what is wrong with a client's grammar is an internal error to vLLM",
    remove_when="vLLM answers it with a 400 that says why",
    upstream="https://github.com/vllm-project/vllm/issues/57725",
)
def raise_why(
    host: Callable[..., Any], processor: Any, engine_core_outputs: Any, *rest: Any, **kw: Any
) -> Any:
    """Around `OutputProcessor.process_outputs`: a 400 if the engine gives a reason."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine import FinishReason

    for each in engine_core_outputs:
        if each.finish_reason == FinishReason.ERROR and isinstance(each.stop_reason, str):
            state = processor.request_states.get(each.request_id)
            if state is not None and state.queue is not None:
                state.queue.put(VLLMValidationError(each.stop_reason, parameter=PARAMETER))
    return host(processor, engine_core_outputs, *rest, **kw)


class Checks:
    """The checks of one event loop; each text is checked once."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._results: OrderedDict[Any, asyncio.Future[Any]] = OrderedDict()

    async def result(self, outputs: Any) -> Any:
        """Structured outputs as vLLM's validation returns them.

        Raises:
            VLLMValidationError: they are wrong, or take too long.
            GracefulHTTPError: too many are being checked.
        """
        from vllm.exceptions import GracefulHTTPError
        from vllm.v1.structured_output.request import get_structured_output_key

        try:
            key = (*get_structured_output_key(outputs), outputs._backend)
        except (ValueError, TypeError):  # the host says what is wrong
            return outputs
        found = self._results.pop(key, None)
        if found is None:
            if sum(not each.done() for each in self._results.values()) >= AT_ONCE + WAITING:
                raise GracefulHTTPError(BUSY, HTTPStatus.SERVICE_UNAVAILABLE)
            found = asyncio.ensure_future(self._check(outputs))
        self._results[key] = found
        done = [key for key, each in self._results.items() if each.done()]
        for old in done[: max(0, len(self._results) - KEPT)]:
            del self._results[old]
        return await asyncio.shield(found)

    async def _check(self, outputs: Any) -> Any:
        async with self._turns:
            return await asyncio.to_thread(_check, outputs)


def _check(outputs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    processes.first().call(0, tokenizer)  # for all that are forked later
    process = processes.first().fork()
    try:
        return process.call(processes.COMPILE_SECONDS, processes.aside, validated, outputs)[1]
    except processes.OverBudgetError:
        message = f"{FIELD} {processes.EXCEEDED}: {SIMPLIFY}"
        raise VLLMValidationError(message, parameter=PARAMETER) from None
    finally:
        process.end()


def validated(state: dict[str, Any], outputs: Any) -> Any:
    """In the process: structured outputs as vLLM's validation leaves them."""
    from vllm import SamplingParams

    config = state["vllm_config"]
    params = SamplingParams(structured_outputs=outputs)
    params._validate_structured_outputs(
        config.model_config, config.structured_outputs_config, state["tokenizer"]
    )
    return params.structured_outputs
