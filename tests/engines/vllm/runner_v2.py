"""vLLM's runner V2 around our model-state class, in plain Python, and what must be written where.

Fake: requests, block tables, and layers whose pages hold a digest of the tokens in place of S and
the window's tokens behind it. Real: the class, the host's class and copy context under it.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec

from qwen3next_plugin.engines.vllm.state.model_state import Qwen3NextModelState

B, W = 8, 4  # tokens of a block, and of a page's window: a draft of 3 and the token before it
PAGE, STRIDE = 45, 64  # bytes of a page, and from page to page
SLOTS, REQUESTS, COLUMNS = 64, 4, 12
GROUPS = {0: (), 1: ("layers.0", "layers.2"), 2: ("layers.1",)}  # 0 is full attention's
LAYERS = ("layers.0", "layers.1", "layers.2")
NULL = 0  # the host's null block


class Page(NamedTuple):
    """What a page says: where its state stands, the state, and the tokens behind it."""

    p0: int
    digest: int
    window: tuple[int, ...]

    def at(self, context: int) -> int:
        """The state after `context` tokens, by the rule of docs/state.md."""
        assert self.p0 <= context <= self.p0 + len(self.window), f"{self} has no {context}"
        return digest(self.window[: context - self.p0], self.digest)

    def pack(self) -> np.ndarray:
        window = (*self.window, *[-1] * (W - len(self.window)))
        head = np.array([self.p0, len(self.window), *window], np.int32)
        body = np.array([self.digest, self.digest + 1], np.int64)
        return np.concatenate([head.view(np.int8), body.view(np.int8), [7] * 5]).astype(np.int8)

    @classmethod
    def unpack(cls, page: np.ndarray) -> "Page":
        head = page[:24].copy().view(np.int32)
        return cls(head[0], int(page[24:32].copy().view(np.int64)[0]), tuple(head[2:][: head[1]]))


def digest(tokens: Iterable[int], state: int) -> int:
    for token in tokens:
        state = (state * 1_000_003 + int(token)) % 2**61
    return state


@dataclass
class Request:
    index: int  # its place in the runner's tables
    blocks: dict[int, list[int]]  # of each cache group
    tokens: list[int] = field(default_factory=list)  # committed
    column: int = -1  # of its page, -1 if it has none

    @property
    def computed(self) -> int:
        return len(self.tokens)


class Row(NamedTuple):
    """What a request does in a step: `length` tokens computed, the first `kept` committed.

    The scheduler gave it room for `scheduled`, of which the device may have trimmed drafts.
    """

    request: Request
    length: int
    kept: int
    sampled: int
    scheduled: int = 0


def chunk(request: Request, length: int, last: bool = False) -> Row:
    return Row(request, length, length, int(last))


def verify(request: Request, drafts: int, sampled: int, trimmed: int = 0) -> Row:
    return Row(request, drafts + 1, sampled, sampled, drafts + 1 + trimmed)


class World:
    """Requests, block tables and layers as runner V2 keeps them, and the class under test."""

    def __init__(self, mode: str = "align", max_num_reqs: int = REQUESTS) -> None:
        self.storage = torch.randint(-128, 128, (3, SLOTS * STRIDE + 8), dtype=torch.int8)
        self.pages = {  # one layer starts at an odd address
            name: row[offset:][: SLOTS * STRIDE].view(SLOTS, STRIDE)[:, :PAGE]
            for name, row, offset in zip(LAYERS, self.storage, (0, 3, 8), strict=True)
        }
        self.tables = [
            torch.zeros(max_num_reqs, COLUMNS, dtype=torch.int32) for _ in range(len(GROUPS))
        ]
        self.free = list(range(1, SLOTS))
        random.Random(0).shuffle(self.free)
        self.ids = itertools.count(1)
        spec = MambaSpec(
            block_size=B,
            shapes=((PAGE,),),
            dtypes=(torch.int8,),
            page_size_padded=STRIDE,
            mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
            mamba_cache_mode=mode,
        )
        groups = [
            KVCacheGroupSpec(list(layers), spec if layers else None) for layers in GROUPS.values()
        ]
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=groups)
        copies = {spec.mamba_type: (get_temporal_copy_spec,)}
        model = SimpleNamespace(get_mamba_state_copy_funcs=lambda types: copies)
        config = vllm_config(mode, self.pages, max_num_reqs)
        self.state = Qwen3NextModelState(config, model, None, torch.device("cpu"))
        self.state.initialize_kv_cache(
            self.kv_cache_config,
            SimpleNamespace(
                block_tables=[SimpleNamespace(gpu=table) for table in self.tables],
                input_block_tables=self.tables,
            ),
        )

    def admit(self, index: int, cached: Request | None = None, hit: int = 0) -> Request:
        """A new or resumed request; with a prefix-cache hit, on the block that ends with it."""
        request = Request(index, {group: [] for group in (1, 2)})
        if cached is not None:
            request.tokens = cached.tokens[:hit]
            request.column = hit // B - 1
            for group, blocks in request.blocks.items():
                blocks += [NULL] * request.column + [cached.blocks[group][request.column]]
        self.state.add_request(index, SimpleNamespace(num_computed_tokens=hit))
        for table in self.tables:
            table[index] = 63  # what an earlier request left there
        return request

    def step(self, *rows: Row, masked: Sequence[int] = ()) -> None:
        """One engine step. Where rows are masked, the host holds them back (pipeline stages)."""
        for row in rows:
            self.allocate(row.request, row.request.computed + max(row.length, row.scheduled))
        mapping = torch.tensor([row.request.index for row in rows], dtype=torch.int32)
        lengths = torch.tensor([0] + [row.length for row in rows], dtype=torch.int32)
        batch = SimpleNamespace(
            num_reqs=len(rows),
            idx_mapping=mapping,
            query_start_loc=lengths.cumsum(0, dtype=torch.int32),
        )
        with self.writes_only(self.moves(rows)):
            self.state.preprocess_state(batch, (), self.kv_cache_config, self.computed(rows))
        for row in rows:
            self.forward(row)
        sampled = torch.tensor([row.sampled for row in rows], dtype=torch.int32)
        mapping[list(masked)] = -1
        kept = [row for i, row in enumerate(rows) if i not in masked]
        with self.writes_only(self.left_behind(kept)):
            self.state.postprocess_state(mapping, sampled, self.computed(rows))
        for row in kept:
            self.check_cached_blocks(row.request)

    def allocate(self, request: Request, num_tokens: int) -> None:
        """As the host's MambaManager: one block at a time, null blocks where it skips some."""
        for group, blocks in request.blocks.items():
            missing = -(-num_tokens // B) - len(blocks)
            if missing > 0:
                blocks += [NULL] * (missing - 1) + [self.free.pop()]
            self.tables[group][request.index, : len(blocks)] = torch.tensor(blocks)

    def computed(self, rows: Sequence[Row]) -> torch.Tensor:
        counts = torch.full((REQUESTS,), 5 * B + 3, dtype=torch.int32)  # others are elsewhere
        for row in rows:
            counts[row.request.index] = row.request.computed
        return counts

    # What must be written, in plain Python: (request, from column, to column).

    def moves(self, rows: Sequence[Row]) -> list[tuple[Request, int, int]]:
        """Before a step a page goes to the block in which the step ends."""
        found = []
        for row in rows:
            old, new = row.request.column, -(-(row.request.computed + row.length) // B) - 1
            row.request.column = new
            if old not in (-1, new):
                found.append((row.request, old, new))
        return found

    def left_behind(self, rows: Sequence[Row]) -> list[tuple[Request, int, int]]:
        """After a step a page stays in the block that the step's tokens filled."""
        found = []
        for row in rows:
            before, after = row.request.computed - row.kept, row.request.computed
            ended = after // B - 1
            if before < (ended + 1) * B and ended != row.request.column and row.length <= W:
                found.append((row.request, row.request.column, ended))
        return found

    def writes_only(self, copies: list[tuple[Request, int, int]]) -> "OnlyTheseCopies":
        return OnlyTheseCopies(self, copies)

    def forward(self, row: Row) -> None:
        """Each layer continues from its page and leaves it as docs/state.md says."""
        request, context = row.request, row.request.computed
        tokens = tuple(next(self.ids) for _ in range(row.length))
        for salt, (name, page) in enumerate(self.running(request), 1):
            state = salt if context == 0 else Page.unpack(page).at(context)
            assert state == digest(request.tokens, salt), f"{name}: another prefix's state"
            if row.length <= W:
                left = Page(context, state, tokens)
            else:
                left = Page(context + row.length, digest(tokens, state), ())
            page[:] = left.pack()
        request.tokens += tokens[: row.kept]

    def running(self, request: Request) -> list[tuple[str, np.ndarray]]:
        return [(name, self.page(name, request, request.column)) for name in LAYERS]

    def page(self, name: str, request: Request, column: int) -> np.ndarray:
        group = next(group for group, layers in GROUPS.items() if name in layers)
        return self.pages[name][request.blocks[group][column]].numpy()

    def check_cached_blocks(self, request: Request) -> None:
        """Every block that is full holds a page that stands at the block's end."""
        for column in range(request.computed // B):
            if request.blocks[1][column] == NULL:
                continue
            end = (column + 1) * B
            for salt, name in enumerate(LAYERS, 1):
                page = Page.unpack(self.page(name, request, column))
                assert page.at(end) == digest(request.tokens[:end], salt), f"{name}: block {column}"


class OnlyTheseCopies:
    """Nothing in the pages' memory changes but by these copies, each byte for byte."""

    def __init__(self, world: World, copies: list[tuple[Request, int, int]]) -> None:
        self.world, self.copies = world, copies

    def __enter__(self) -> None:
        world, real = self.world, self.world.storage.clone()
        for request, old, new in self.copies:
            for name in LAYERS:
                world.page(name, request, new)[:] = world.page(name, request, old)
        self.expected = world.storage.clone()
        world.storage.copy_(real)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            assert torch.equal(self.world.storage, self.expected)
            assert (self.world.state.num_accepted_tokens_gpu == 1).all()


def vllm_config(mode: str, pages: dict[str, torch.Tensor], max_num_reqs: int) -> SimpleNamespace:
    """The fields that the host's classes read."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            get_inputs_embeds_size=lambda: 0,
            dtype=torch.float32,
            enable_prompt_embeds=False,
            uses_mrope=False,
            max_model_len=COLUMNS * B,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_reqs, max_num_batched_tokens=64),
        cache_config=SimpleNamespace(
            mamba_cache_mode=mode, mamba_block_size=B, use_kda_recoverssm=False
        ),
        compilation_config=SimpleNamespace(
            static_forward_context={
                name: SimpleNamespace(kv_cache=(page,)) for name, page in pages.items()
            }
        ),
    )
