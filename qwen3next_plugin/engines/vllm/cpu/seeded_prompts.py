"""Seeds of prompts that are read in more than one chunk, on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen3next_plugin.engines.patching import override


@override(
    "vllm.v1.worker.gpu_input_batch.InputBatch.generators",
    reason="vLLM samples for unfinished prompts and rewinds their generator by an offset, which "
    "a CPU generator lacks: a seeded prompt in two chunks would end the engine",
    remove_when="vLLM asks a generator for no offset (`compat`)",
)
@contextmanager
def without_generators_of_prompts(runner: Any) -> Iterator[None]:
    """Take the generators of requests with an unfinished prompt out of the batch.

    vLLM samples for them too, drops the token, and rewinds the generator with `set_offset`, which a
    CPU generator does not have: a seeded prompt of more than one chunk would end the engine (0.32,
    `_bookkeeping_sync`). Remove when vLLM does not call `set_offset`: a test marked
    `compat` checks that.
    """
    batch = runner.input_batch
    unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    taken = {i: batch.generators.pop(i) for i in unfinished if i in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(taken)
