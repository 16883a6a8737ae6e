"""Structured outputs whose check or index would end or block the server."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from subprocess import PIPE
from typing import Any

SECONDS, GIB = 2, 1  # of CPU time and memory; schemas of real tools take milliseconds
PATIENCE = 5 * SECONDS  # on a clock, while other processes use the cores
IMPORTED = "the library is imported"  # what the process prints before it checks
# An index has some 16 bytes for each state and token that may follow. The share of ASCII bytes that
# may follow a state is about that of all tokens, of which nearly none begins within a character.
# 250,000: the largest vocabulary of a released model.
TOKENS, ENTRY, ASCII = 250_000, 16, 128
LIMIT = f"""
print({IMPORTED!r}, flush=True)
import resource, sys
for limit, most in (resource.RLIMIT_CPU, {SECONDS}), (resource.RLIMIT_AS, {GIB} << 30):
    resource.setrlimit(limit, (most, most))
"""
GUIDANCE = f"""
import llguidance
{LIMIT}
llguidance.LLMatcher.validate_grammar(sys.stdin.read(), None)
"""
OUTLINES = f"""
import outlines_core
from outlines_core.json_schema import build_regex_from_schema
{LIMIT}
kind, _, text = sys.stdin.read().partition(":")
try:
    regex = build_regex_from_schema(text) if kind == "json" else text
    tokens = outlines_core.Vocabulary(256, {{bytes([byte]): [byte] for byte in range(256)}})
    found = outlines_core.Index(regex, tokens).get_transitions()
except Exception as error:  # the host says what is wrong
    sys.exit(isinstance(error, MemoryError))
moves = sum(byte < {ASCII} for state in found.values() for byte in state)
sys.exit(moves * {TOKENS * ENTRY // ASCII} > {GIB} << 30)
"""


def refuse_costly(host: Callable[..., None], params: Any, tokenizer: Any = None) -> None:
    """Wrap `validate_guidance_grammar`: try the grammar in a process with limits first.

    llguidance has none for some schemas: `minItems` of 10⁹ takes all memory, 1,000 patterns of
    properties take minutes, 40,000 required properties overflow its stack. vLLM gives it what
    xgrammar lacks, in the process that answers all clients.

    Raises:
        VLLMValidationError: the grammar exceeds a limit.
        RuntimeError: the process cannot import llguidance.
    """
    from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar
    from vllm.v1.structured_output.request import get_structured_output_key

    try:
        grammar = serialize_guidance_grammar(*get_structured_output_key(params.structured_outputs))
    except (AttributeError, ValueError, KeyError, TypeError):  # the host says what is wrong
        return host(params, tokenizer)
    _check(GUIDANCE, grammar)
    return host(params, tokenizer)


def refuse_large(host: Callable[..., None], params: Any) -> None:
    """Wrap `validate_structured_output_request_outlines`: count an index's states first.

    outlines stores each token that may follow each state: for `maxLength` of 5,000 some 10 GB, in
    the engine's process. vLLM gives it schemas with `patternProperties`.

    Raises:
        VLLMValidationError: the index, or the regular expression, exceeds a limit.
        RuntimeError: the process cannot import outlines_core.
    """
    asked = params.structured_outputs
    if asked is not None and asked.regex:
        _check(OUTLINES, f"regex:{asked.regex}")
    elif asked is not None and asked.json:
        try:
            text = asked.json if isinstance(asked.json, str) else json.dumps(asked.json)
        except TypeError:  # the host says what is wrong
            return host(params)
        _check(OUTLINES, f"json:{text}")
    return host(params)


def _check(code: str, text: str) -> None:
    from vllm.exceptions import VLLMValidationError

    if not _is_cheap(code, text):
        raise VLLMValidationError(
            f"structured_outputs takes over {SECONDS} s of CPU time or {GIB} GiB of memory: "
            "simplify it, and lower minItems, maxItems and maxLength of a JSON schema"
        )


@lru_cache(maxsize=16)  # it keeps the texts, and a client may send large ones
def _is_cheap(code: str, text: str) -> bool:
    """Whether a process that runs the code on the text stays within the limits."""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        out, err = process.communicate(text.encode(), timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    if IMPORTED.encode() not in out:
        said = err.decode(errors="replace") or f"no answer in {PATIENCE} s"
        raise RuntimeError(f"structured_outputs cannot be checked: {said}")
    return process.returncode == 0
