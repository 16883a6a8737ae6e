"""Makes answers end at the same token with and without drafts, and at a grammar's end."""

from collections import deque
from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.patches import When, patch

_read = set[int]()  # requests whose grammar has read this step's token


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.schedule_batch.Req.update_finish_state",
    reason="of the tokens of a verification, SGLang takes the stop string that is listed first "
    "for the end, and any string before a stop token",
    remove_when="SGLang's answers end at the earliest token, with drafts too",
    upstream="https://github.com/sgl-project/sglang/pull/28802",
)
def stop_at_first(host: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """Wrap `Req.update_finish_state`: look at the tokens of a verification one by one.

    SGLang looks at all of them for the first string of its list, and then for stop tokens.
    """
    params = req.sampling_params
    several = new_accepted_len > 1 and (params.stop_strs or params.stop_regex_strs)
    if not several or req.finished() or req.to_finish:
        return host(req, new_accepted_len)
    behind = deque(req.output_ids[-new_accepted_len:])
    del req.output_ids[-new_accepted_len:]
    grammar, req.grammar = req.grammar, None  # it has read all of them
    while behind and not req.finished():
        req.output_ids.append(behind.popleft())
        if not behind:
            req.grammar = grammar
        host(req, 1)
    req.grammar = grammar
    if req.finished() and req.finished_len is None:
        req.finished_len = len(req.output_ids)
    req.output_ids.extend(behind)
    return None


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor.process_batch_result_prefill",
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor.process_batch_result_decode",
    reason="without drafts, and at a prompt's end, ignore_eos lets SGLang sample once more "
    "behind a grammar's end",
    remove_when="SGLang's grammars read a token before it looks for the answer's end",
)
def end_with_the_grammar(
    host: Callable[[Any, Any, Any], None], processor: Any, batch: Any, result: Any
) -> None:
    """Wrap `process_batch_result_prefill` and `…_decode`: first let grammars read the tokens.

    Except in verifications, SGLang looks for an answer's end before its grammar has read the token:
    with ignore_eos it samples once more after the grammar's end.
    """
    verified = batch.forward_mode.is_decode() and not batch.spec_algorithm.is_none()
    if verified or all(req.grammar is None for req in batch.reqs):
        return host(processor, batch, result)
    processor.advance_grammar_fsm(result, batch)  # reads prompts' tokens, not those of plain steps
    if result.grammar_advanced:
        return host(processor, batch, result)
    if result.copy_done is not None:
        result.copy_done.synchronize()
    for req, token_id in zip(batch.reqs, result.next_token_ids.tolist(), strict=True):
        over = req.grammar is None or req.finished() or req.is_retracted
        if not over and req.inflight_middle_chunks <= 0:
            processor._accept_grammar_tokens(req, token_id)
            _read.add(id(req))
    result.grammar_advanced = True
    try:
        return host(processor, batch, result)
    finally:
        _read.clear()


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._accept_grammar_tokens",
    reason="without drafts, and at a prompt's end, ignore_eos lets SGLang sample once more "
    "behind a grammar's end",
    remove_when="SGLang's grammars read a token before it looks for the answer's end",
)
def read_once(host: Callable[..., list[int]], processor: Any, req: Any, tokens: Any) -> list[int]:
    """Wrap `_accept_grammar_tokens`: a grammar may have read the token already."""
    return tokens if id(req) in _read else host(processor, req, tokens)
