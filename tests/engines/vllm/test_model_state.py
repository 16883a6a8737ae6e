"""Pages under prefix caching on vLLM's runner V2: moved along, left behind, nothing else written.

The host's three Triton kernels run from their own source, by Triton's interpreter. The runner
around them and the layers are fakes, see runner_v2.py.
"""

import random
from pathlib import Path

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.worker import mamba_utils
from vllm.v1.worker.gpu.model_states import mamba_hybrid, resolve_model_state_cls

from engines.vllm.host_kernels import helpers, interpreted
from engines.vllm.runner_v2 import COLUMNS, NULL, REQUESTS, B, W, World, chunk, verify
from qwen3next_plugin.engines.vllm.state.model_state import Qwen3NextModelState


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return interpreted(Path(mamba_utils.__file__), tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def world(kernels, monkeypatch):
    for name, helper in helpers().items():
        monkeypatch.setattr(tl, name, helper)
    for module, name in (
        (mamba_hybrid, "preprocess_mamba_align_fused_kernel"),
        (mamba_utils, "precopy_mamba_align_fused_kernel"),
        (mamba_utils, "postprocess_mamba_fused_kernel"),
    ):
        monkeypatch.setattr(module, name, getattr(kernels, name))
    # The host splits a page over 16 programs; ours are too small for more than one to copy any.
    monkeypatch.setattr(mamba_utils, "_TEMPORAL_TILES", 2)
    return World()


# one request -------------------------------------------------------------------------------------


def test_first_chunk_takes_nothing_along(world):
    world.step(chunk(world.admit(0), 5))


def test_decode_within_a_block_and_into_the_next(world):
    request = world.admit(2)
    world.step(chunk(request, 5, last=True))
    for _ in range(2 * B):
        world.step(verify(request, 0, 1))
    assert request.column == 2


@pytest.mark.parametrize("sampled", range(1, W + 1))
@pytest.mark.parametrize("before", range(2 * B - W, 2 * B + 1))
def test_verified_draft_at_a_block_boundary(world, before, sampled):
    """The boundary lies at each place in the draft, and each number of its tokens is right."""
    request = world.admit(1)
    world.step(chunk(request, B))
    world.step(chunk(request, before - B, last=True))
    world.step(verify(request, W - 1, sampled))
    for drafts, kept in ((0, 1), (W - 1, 2), (1, 1), (W - 1, W)):
        world.step(verify(request, drafts, kept))


def test_shorter_draft_takes_a_page_back(world):
    """A rejected draft had already moved the page into a block that the next step stays out of."""
    request = world.admit(0)
    world.step(chunk(request, B - 2, last=True))
    world.step(verify(request, W - 1, 1))
    assert request.column == 1
    world.step(verify(request, 0, 1))
    assert request.column == 0
    world.step(verify(request, W - 1, W))


@pytest.mark.parametrize("trimmed", range(W))
@pytest.mark.parametrize("before", range(B - W, B + 1))
def test_drafts_that_the_device_trimmed(world, before, trimmed):
    """Adaptive verification: the blocks are those of the whole draft, the tokens are fewer."""
    request = world.admit(0)
    world.step(chunk(request, before, last=True))
    for _ in range(3):
        drafts = W - 1 - trimmed
        world.step(verify(request, drafts, drafts + 1, trimmed))
        world.step(verify(request, drafts, 1, trimmed))


def test_chunks_end_at_boundaries_and_skip_blocks(world):
    request = world.admit(3)
    for length in (3, B - 3, 3 * B, B, 2 * B + 5):
        world.step(chunk(request, length))
    assert request.blocks[1].count(NULL) == 4
    world.step(verify(request, W - 1, W))


def test_hit_starts_from_a_copy_of_the_cached_block(world):
    first = world.admit(0)
    world.step(chunk(first, 2 * B))
    world.step(chunk(first, B - 2, last=True))
    world.step(verify(first, W - 1, W))  # block 2 is filled in the middle of a draft
    for hit in (2 * B, 3 * B):
        second = world.admit(1, first, hit)
        world.step(chunk(second, 5, last=True))
        world.step(verify(second, 2, 2))
        world.check_cached_blocks(first)


def test_preempted_request_resumes_on_its_cached_block_or_from_nothing(world):
    request = world.admit(0)
    world.step(chunk(request, B))
    world.step(chunk(request, 3, last=True))
    world.step(verify(request, W - 1, 2))
    resumed = world.admit(0, request, B)
    world.step(chunk(resumed, 4, last=True))
    again = world.admit(0)
    world.step(chunk(again, B))
    world.step(verify(again, W - 1, 3))


# batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_ragged_batches_in_any_order(world, seed):
    """Chunks, decodes and drafts of all lengths mixed; rows trade places from step to step."""
    rng = random.Random(seed)
    requests = {index: world.admit(index) for index in range(REQUESTS)}
    prompts = {index: rng.randrange(1, 3 * B) for index in requests}
    for _ in range(12):
        rows = []
        for index in rng.sample(sorted(requests), rng.randrange(1, REQUESTS + 1)):
            request = requests[index]
            left = prompts[index] - request.computed
            if left > 0:
                length = min(left, B - request.computed % B, rng.randrange(1, B + 1))
                rows.append(chunk(request, length, last=length == left))
            elif request.computed + W < COLUMNS * B:
                drafts = rng.randrange(W)
                rows.append(verify(request, drafts, rng.randrange(1, drafts + 2)))
        if rows:
            world.step(*rows)


def test_masked_rows_are_left_alone(world):
    """The last place of the tables is a request's own, though a mask of -1 points at it too."""
    requests = [world.admit(index) for index in (3, 1)]
    for request in requests:
        world.step(chunk(request, B - 1, last=True))
    rows = verify(requests[0], W - 1, W), verify(requests[1], W - 1, 1)
    world.step(*rows, masked=(1,))
    world.step(verify(requests[0], W - 1, W))


@pytest.mark.parametrize(
    "sampled", [0, torch.tensor([1], dtype=torch.int32)], ids=["int", "tensor"]
)
def test_without_a_count_of_tokens_nothing_is_copied(world, sampled):
    """So the host calls it on pipeline stages that have not heard of the samples yet."""
    request = world.admit(0)
    world.step(chunk(request, B - 1, last=True))
    with world.writes_only([]):
        world.state.postprocess_state(torch.tensor([0], dtype=torch.int32), sampled)


def test_without_prefix_caching_or_rows_nothing_is_done(world):
    none, some = (torch.zeros(n, dtype=torch.int32) for n in (0, 1))
    counts = torch.full((REQUESTS,), B, dtype=torch.int32)
    with world.writes_only([]):
        world.state.postprocess_state(none, none, counts)
    plain = World(mode="none")
    plain.admit(0)
    with plain.writes_only([]):
        plain.state.postprocess_state(some, some + 1, counts)


# beside the host's own ---------------------------------------------------------------------------


def test_blocks_are_those_that_the_host_would_fill(world, kernels):
    """The host's kernel, in its own terms of accepted tokens and shifts, writes the same blocks."""
    cases = [
        (before, drafts, sampled)
        for before in range(1, 2 * B + 2)
        for drafts in range(W)
        for sampled in range(1, drafts + 2)
    ]
    n, columns = len(cases), 2 * B
    before, drafts, sampled = torch.tensor(cases, dtype=torch.int32).T.contiguous()
    column = ((before + drafts + 1 + B - 1) // B - 1).int()
    reached = (before + sampled).int()
    table = torch.arange(n * columns, dtype=torch.int32).view(n, columns)
    page = table.view(-1, 1).long().clone()  # each block holds its number
    scalar = [torch.tensor([value]) for value in (page.data_ptr(), 8)]
    kernels.postprocess_mamba_fused_kernel[(n, 1, 1)](
        sampled, column, None, reached, None, torch.tensor([table.data_ptr()]), columns, *scalar,
        torch.tensor([8], dtype=torch.int32), torch.tensor([1]),
        *[torch.tensor([0], dtype=torch.int32)] * 3, torch.tensor([0]),
        sampled.clone(), torch.arange(n, dtype=torch.int32), n,
        block_size=B, COPY_BLOCK_SIZE=16, CONV_STATE_DIM_FIRST=False,
        HAS_IDX_MAPPING=True, PRECOMPUTED_NEW_COMPUTED=True,
    )  # fmt: skip
    theirs = (page.view(n, columns) != table).nonzero().tolist()
    theirs = [[row, to] for row, to in theirs if to != column[row]]  # ours stands there already

    ours = recorded(world, column, reached, sampled)
    assert len(theirs) > 20
    assert [[row, to] for row, _, to in ours] == theirs
    assert [source for _, source, _ in ours] == [column[row] for row, _ in theirs]


def recorded(world: World, column, reached, sampled) -> list[tuple[int, int, int]]:
    """The copies that our class asks for: row, from column, to column."""
    n = len(column)
    state = World(max_num_reqs=n).state
    state._mamba_state_idx_gpu = column
    found = []

    def copy(num_reqs, to, source, shift, mapping):
        assert not shift.any()
        for row in mapping.tolist():
            if source[row] not in (-1, to[row]):
                found.append((row, int(source[row]), int(to[row])))

    state._mamba_ctx.run_fused_precopy = copy
    state.postprocess_state(torch.arange(n, dtype=torch.int32), sampled, reached)
    return found


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device: values or shapes that the CPU has to know."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_to_copy")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITING, func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(world):
    world.state._mamba_ctx.run_fused_precopy = lambda *arguments: None
    mapping = torch.tensor([2, -1, 0], dtype=torch.int32)
    counts = torch.full((REQUESTS,), B, dtype=torch.int32)
    with NoWaiting():
        world.state.postprocess_state(mapping, torch.ones_like(mapping), counts)


def test_the_model_names_the_class():
    from qwen3next_plugin.engines.vllm.model.trunk import Qwen3NextForCausalLM

    assert resolve_model_state_cls(None, Qwen3NextForCausalLM) is Qwen3NextModelState
