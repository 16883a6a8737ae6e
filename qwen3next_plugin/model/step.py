"""Step: what one engine step asks of every linear-attention layer."""

from dataclasses import dataclass

import torch

from qwen3next_plugin.kernels.gpu import faults

NULL_SLOT = -1  # of a padding row: it owns no page, and its output is zero


class StepError(ValueError):
    """A step that asks for what cannot be; `row` is the row it is about, if it is about one."""

    def __init__(self, what: str, row: int | None = None) -> None:
        super().__init__(what)
        self.row = row


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step, built once and shared by all linear layers.

    A row is a sequence. Nothing says whether it prefills, decodes or verifies a draft, nor how
    many tokens of the last draft were accepted: the context length and the row's own page say it.

    Shapes:
        query_start_loc [N+1] int32   row i owns tokens query_start_loc[i] to [i+1]
        slot            [N]   int32   the page of each row, or NULL_SLOT
        context_len     [N]   int32   tokens of the sequence committed before this step

    max_query_len: no row with a page has more tokens; an int, so that no kernel waits to learn it.
    """

    query_start_loc: torch.Tensor
    slot: torch.Tensor
    context_len: torch.Tensor
    num_tokens: int
    max_query_len: int

    @classmethod
    def build(
        cls,
        *,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        slot: torch.Tensor,
        num_tokens: int,
        num_slots: int,
        max_query_len: int,
    ) -> "Step":
        """Build a step from what an engine knows of it; on a CPU, bound every index.

        On a GPU that would be a wait in every step: there the kernels bound what they read.

        Shapes:
            query_start_loc [N+1], seq_lens [N] (committed + this step's tokens), slot [N]

        Raises:
            StepError: naming the first row whose slot or lengths are out of range.
        """
        query_len = query_start_loc.diff()
        step = cls(
            query_start_loc=query_start_loc.to(torch.int32),
            slot=slot.to(torch.int32),
            context_len=(seq_lens - query_len).to(torch.int32),
            num_tokens=num_tokens,
            max_query_len=max_query_len,
        )
        if slot.device.type == "cpu":
            step._check(query_len, num_slots)
        return step

    def _check(self, query_len: torch.Tensor, num_slots: int) -> None:
        active = self.slot != NULL_SLOT
        self._refuse(query_len < 0, "a negative query length", query_len)
        too_long = query_len > self.max_query_len
        self._refuse(too_long, f"more than {self.max_query_len} tokens", query_len)
        self._refuse(active & (self.context_len < 0), "a negative context length", self.context_len)
        out_of_range = active & ((self.slot < 0) | (self.slot >= num_slots))
        self._refuse(out_of_range, f"a slot outside [0, {num_slots})", self.slot)
        if self.query_start_loc[0] != 0 or self.query_start_loc[-1] > self.num_tokens:
            raise StepError(
                f"rows span tokens {self.query_start_loc[0]} to {self.query_start_loc[-1]} "
                f"of a step of {self.num_tokens}"
            )

    @staticmethod
    def _refuse(bad: torch.Tensor, what: str, values: torch.Tensor) -> None:
        if bad.any():
            row = int(bad.nonzero()[0])
            raise StepError(f"row {row} has {what}: {int(values[row])}", row)


class DeviceSteps:
    """Builds steps on a GPU, without waiting for it, in tensors that a CUDA graph may keep.

    Both hosts give slot 0 to nobody: rows on it, and rows without tokens, are padding.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.slot = torch.full((max_rows,), NULL_SLOT, dtype=torch.int32, device=device)
        self.context_len = torch.zeros_like(self.slot)
        self.query_start_loc = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self.watch = faults.Watch(device) if device.type == "cuda" else None

    def build(
        self,
        *,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        slot: torch.Tensor,
        num_tokens: int,
        max_query_len: int,
    ) -> Step:
        """Build the next step; the one before must have been launched.

        Shapes:
            query_start_loc [N+1], seq_lens [N] (committed + this step's tokens), slot [N]

        Raises: RuntimeError: an earlier step had a row that its page could not serve.
        """
        if self.watch is not None:
            self.watch.look()
        N = len(slot)
        query_start_loc = self.query_start_loc[: N + 1].copy_(query_start_loc)
        query_len = query_start_loc.diff()
        is_padding = (query_len == 0) | (slot == 0)
        return Step(
            query_start_loc=query_start_loc,
            slot=self.slot[:N].copy_(slot.masked_fill(is_padding, NULL_SLOT)),
            context_len=self.context_len[:N].copy_(seq_lens - query_len),
            num_tokens=num_tokens,
            max_query_len=max_query_len,
        )
