"""What the ranks of an engine do only together: they take other weights, or none of them does."""

from collections.abc import Callable

from torch.distributed import ProcessGroup, all_gather_object


def refusal(check: Callable[[], None], ranks: ProcessGroup) -> str | None:
    """What the first rank that refuses says, in every rank; None: no rank refuses.

    Every rank calls this. A check refuses by any exception, and has changed nothing.
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
