"""Lets the ranks of an engine agree: either all take new weights, or none does."""

from collections.abc import Callable

from torch.distributed import ProcessGroup, all_gather_object


def refusal(check: Callable[[], None], ranks: ProcessGroup) -> str | None:
    """The error of the first rank that refuses, returned on every rank; None: no rank refuses.

    Every rank calls this. A check refuses by raising any exception, and must change nothing.
    """
    own = None
    try:
        check()
    except Exception as error:
        own = str(error) or repr(error)
    said: list[str | None] = [None] * ranks.size()
    all_gather_object(said, own, group=ranks)
    refusals = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]
    if not refusals:
        return None
    return own if len(said) == 1 else refusals[0]
