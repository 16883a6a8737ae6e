"""Steps that verify draft trees: each path from the root to a leaf is a row of its own.

A page holds one sequence, not a tree. The first path of a request runs on the request's page, each
other path on a copy of it. Tokens shared by several paths are computed once for each path, with
the same bits. After verification the page of the accepted path is copied to the request's page.
"""

from dataclasses import dataclass

import torch

from qwen3next_plugin.model.step import Step, build_step


@dataclass(frozen=True, slots=True)
class TreeStep:
    """The paths of the trees of a step.

    Shapes:
        token [P] int64      the index in the batch of each token of the paths
        source, branch [B]   the request's slot and its copy's slot, for each path but the first
    """

    paths: list[list[list[int]]]  # nodes of each path of each request
    slots: list[list[int]]  # of each path of each request
    step: Step
    token: torch.Tensor
    source: torch.Tensor
    branch: torch.Tensor

    @classmethod
    def build(
        cls,
        *,
        next_token: torch.Tensor,
        next_sibling: torch.Tensor,
        context_len: torch.Tensor,
        slot: torch.Tensor,
        num_slots: int,
        first_branch: int,
    ) -> "TreeStep":
        """Lay out the paths of N trees of n nodes each; copies use slots from first_branch.

        Shapes:
            next_token, next_sibling [N, n], first child and next sibling of each node, or -1
            context_len, slot [N]
        """
        n = next_token.shape[1]
        trees = zip(next_token.tolist(), next_sibling.tolist(), strict=True)
        paths = [root_to_leaf(child, sibling) for child, sibling in trees]
        own, free = slot.tolist(), iter(range(first_branch, num_slots))
        slots = [[own[i], *(next(free) for _ in each[1:])] for i, each in enumerate(paths)]
        lengths = torch.tensor([len(path) for each in paths for path in each])
        context = context_len.repeat_interleave(torch.tensor([len(each) for each in paths]))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return cls(
            paths=paths,
            slots=slots,
            step=build_step(
                query_start_loc=starts,
                seq_lens=context + lengths,
                slot=torch.tensor([page for each in slots for page in each]),
                num_tokens=int(starts[-1]),
                num_slots=num_slots,
                max_query_len=max(len(path) for each in paths for path in each),
            ),
            token=torch.tensor(
                [i * n + node for i, each in enumerate(paths) for path in each for node in path]
            ),
            source=torch.tensor([own[i] for i, each in enumerate(slots) for _ in each[1:]]).long(),
            branch=torch.tensor([page for each in slots for page in each[1:]]).long(),
        )

    def accepted(self, last_node: list[int]) -> tuple[list[int], list[int]]:
        """Slots to copy from and to, so that each request's page has the path to its node."""
        pairs = []
        for paths, slots, node in zip(self.paths, self.slots, last_node, strict=True):
            page = next(slot for path, slot in zip(paths, slots, strict=True) if node in path)
            if page != slots[0]:
                pairs.append((page, slots[0]))
        return [page for page, _ in pairs], [page for _, page in pairs]


def root_to_leaf(next_token: list[int], next_sibling: list[int]) -> list[list[int]]:
    """Every path of one tree, leftmost first."""
    paths, unfinished = [], [[0]]
    while unfinished:
        path = unfinished.pop()
        child = next_token[path[-1]]
        if child < 0:
            paths.append(path)
            continue
        children = [child]
        while (sibling := next_sibling[children[-1]]) >= 0:
            children.append(sibling)
        unfinished += [[*path, node] for node in reversed(children)]
    return paths
