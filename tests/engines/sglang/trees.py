"""Random draft trees in the host's form, and a walk over them."""

import random
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Tree:
    """Each node's parent, -1 for the root and for a node whose parent was not selected."""

    parents: list[int]

    def children(self, node: int) -> list[int]:
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def ancestors(self, node: int) -> list[int]:
        """The node and what lies above it, the root left out."""
        path = []
        while node > 0:
            path.append(node)
            node = self.parents[node]
        return path

    def links(self) -> tuple[list[int], list[int]]:
        """First child and next sibling of each node, -1 where there is none."""
        first, sibling = [-1] * len(self.parents), [-1] * len(self.parents)
        for node in range(len(self.parents)):
            children = self.children(node)
            first[node] = children[0] if children else -1
            for a, b in pairwise(children):
                sibling[a] = b
        return first, sibling


def random_tree(rng: random.Random, D: int, topk: int) -> Tree:
    parents = [-1]
    for node in range(1, D):
        free = [p for p in range(node) if parents.count(p) < topk]
        parents.append(rng.choice(free))
    return Tree(parents)


def chain(D: int) -> Tree:
    return Tree(list(range(-1, D - 1)))


def linked(trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """retrive_index, retrive_next_token and retrive_next_sibling of a batch: [N, D] each."""
    D = len(trees[0].parents) if trees else 3
    links = [tree.links() for tree in trees]
    index = torch.arange(len(trees) * D).view(-1, D)
    first = torch.tensor([a for a, _ in links], dtype=torch.int64).view(-1, D)
    sibling = torch.tensor([b for _, b in links], dtype=torch.int64).view(-1, D)
    return index, first, sibling
