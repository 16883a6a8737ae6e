"""Structured outputs whose check would end or block the server."""

import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

SECONDS, GIB = 2, 1  # of CPU time and memory; schemas of real tools take milliseconds
IMPORTED = "llguidance is imported"  # what the process prints before it checks
CHECK = f"""
import resource, sys, llguidance
print({IMPORTED!r}, flush=True)
for limit, most in (resource.RLIMIT_CPU, {SECONDS}), (resource.RLIMIT_AS, {GIB} << 30):
    resource.setrlimit(limit, (most, most))
llguidance.LLMatcher.validate_grammar(sys.stdin.read(), None)
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
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar
    from vllm.v1.structured_output.request import get_structured_output_key

    try:
        grammar = serialize_guidance_grammar(*get_structured_output_key(params.structured_outputs))
    except (AttributeError, ValueError, KeyError, TypeError):  # the host says what is wrong
        return host(params, tokenizer)
    if not _is_cheap(grammar):
        raise VLLMValidationError(
            f"structured_outputs takes over {SECONDS} s of CPU time or {GIB} GiB of memory to "
            "check: simplify it, and lower minItems and maxItems of a JSON schema"
        )
    return host(params, tokenizer)


@lru_cache(maxsize=16)  # it keeps the grammars, and a client may send large ones
def _is_cheap(grammar: str) -> bool:
    """Whether llguidance reads it within the limits."""
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, input=grammar.encode(), capture_output=True)
    if IMPORTED.encode() not in done.stdout:
        said = done.stderr.decode(errors="replace")
        raise RuntimeError(f"no grammar can be checked, because llguidance is not imported: {said}")
    return done.returncode == 0
