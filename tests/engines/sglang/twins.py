"""The stand-in against the host's own Triton kernels, in Triton's interpreter; see test_twins.py.

Prints a line for each operator that differs.
"""

import random
import sys
from importlib import import_module

import torch

from engines.sglang.test_tree import candidates_of
from engines.sglang.trees import linked, random_tree
from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide

provide()
ours = import_module("sgl_kernel")
host = {
    name: import_module(f"sglang.kernels.ops.speculative.{name}")
    for name in ("spec_tree", "eagle", "cache_locs", "multi_layer_eagle")
}
N, R, M = 3, 7, 20


def tree(rng: random.Random):
    """build_tree and verify_tree_greedy, trees whose parents were not selected included."""
    topk, depth = rng.choice([1, 2, 3]), rng.randint(1, 4)
    most = topk + (depth - 1) * topk * topk
    D = rng.randint(2, min(12, most + 1))
    given = [candidates_of(rng, topk, depth, D) for _ in range(N)]
    parents = torch.tensor([p for p, _ in given])
    at_random = torch.tensor([sorted(rng.sample(range(most), D - 1)) for _ in range(N)])
    seq_lens = torch.randint(0, 7, (N,))
    for mode in (0, 1):
        for selected in (torch.tensor([s for _, s in given]), at_random):

            def build(kernel, mode=mode, selected=selected):
                mask = torch.ones(int((seq_lens + D).sum()) * D, dtype=torch.bool)
                positions, links = torch.full((N * D,), -7), torch.full((3, N, D), -1)
                kernel(parents, selected, seq_lens, mask, positions, *links, topk, depth, D, mode)
                return mask, positions, links

            yield build, host["spec_tree"].sgl_build_tree_kernel_triton, (
                ours.build_tree_kernel_efficient_cpu
            )  # fmt: skip
    links, S = linked([random_tree(rng, D, topk) for _ in range(N)]), rng.randint(2, max(2, D))
    tokens, target = torch.randint(0, 3, (2, N, D))

    def verify(kernel):
        predicts = torch.full((N * D,), -7, dtype=torch.int32)
        index, count = torch.full((N, S + 1), -1, dtype=torch.int32).split([S, 1], 1)
        index, count = index.contiguous(), count.flatten().contiguous()
        kernel(predicts, index, count, tokens, *links, target)
        return predicts, index, count

    yield verify, host["spec_tree"].verify_tree_greedy_triton, ours.verify_tree_greedy_cpu


def locations(rng: random.Random):
    """The table's readers, and the accepted locations."""
    pool, rows = torch.randint(0, 999, (R, M)).int(), torch.randperm(R)[:N]
    start = torch.randint(0, 5, (N,))
    end = start + torch.randint(0, 9, (N,))
    module = host["cache_locs"]

    def extend(kernel):
        out = torch.full((30,), -7)
        kernel(rows, pool, start, end, out, M)
        return (out,)

    yield extend, lambda *a: module.assign_extend_cache_locs[(N,)](*a, 4), (
        ours.assign_extend_cache_locs_cpu
    )  # fmt: skip

    def draft(kernel):
        out = torch.full((20,), -7)
        kernel(rows, pool, start, out, M, 2, 3)
        return (out,)

    yield draft, module.assign_draft_cache_locs_contiguous[(N,)], (
        ours.assign_draft_cache_locs_contiguous_cpu
    )  # fmt: skip
    index, slots = torch.randint(-1, 6, (9,)).int(), torch.randint(0, 99, (6,))

    def accepted(kernel):
        out = torch.full((12,), -7)
        kernel(index, slots, out)
        return (out,)

    yield accepted, lambda *a: host["eagle"].fill_accept_out_cache_loc[(9,)](*a, 16), (
        ours.fill_accept_out_cache_loc_cpu
    )  # fmt: skip


def tokens(rng: random.Random):
    """The rotation of input ids, and the bonus tokens."""
    lens = torch.randint(0, 6, (N,)).int()
    start, new = (lens.cumsum(0) - lens).int(), torch.randint(0, 99, (N,))
    ids, verified = torch.randint(0, 99, (30,)), torch.randint(0, 99, (N * 4,)).int()
    select = (start + (lens - 1).clamp(min=0) // 2).long() if rng.random() < 0.5 else None

    def rotate(kernel):
        out = ids.clone()
        kernel(out, start, lens, new, select)
        return (out,)

    yield rotate, host["multi_layer_eagle"].rotate_input_ids, ours.rotate_input_ids_cpu
    accept_lens = torch.randint(1, 5, (N,)).int()

    def bonus(kernel):
        out = torch.full((N + 1,), -7, dtype=torch.int32)
        kernel(verified, accept_lens, out, 4)
        return (out,)

    yield bonus, host["eagle"].fill_bonus_tokens[(N,)], ours.fill_bonus_tokens_cpu


def main(seeds: int) -> None:
    torch.manual_seed(0)
    compared = 0
    for seed in range(seeds):
        rng = random.Random(seed)
        for cases in (tree, locations, tokens):
            for call, theirs, own in cases(rng):
                compared += 1
                if not all(map(torch.equal, call(theirs), call(own))):
                    print(f"differs: {call.__name__}, seed {seed}")
    print(f"compared {compared}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
