"""Seeds of prompts that are read in more than one chunk, on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
