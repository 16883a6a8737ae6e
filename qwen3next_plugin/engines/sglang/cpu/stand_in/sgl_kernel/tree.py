"""A tree of drafts: its layout for one verify pass, and its greedy verification.

Shapes, everywhere: N requests; D nodes of each tree, node 0 the last committed token; `retrieve_*`
[N, D]: a node's row in the batch, its first child, and its next sibling, -1 where there is none.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgl_kernel.operators import operator

FULL_MASK, QLEN_ONLY = 0, 1


@operator(
    "tree_mask", "positions", "retrieve_index", "retrieve_next_token", "retrieve_next_sibling"
)
def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Compute links, positions and visibility of the selected drafts.

    Shapes:
        parent_list: [N, P], the candidate that each group of topk candidates continues
        selected_index: [N, D - 1], the candidates that became nodes, ascending
        verified_seq_len: [N], committed tokens
        tree_mask: flat, written: per request D rows of D (QLEN_ONLY), or of the committed
            tokens, which are left unchanged, and D (FULL_MASK)
        positions: [N * D], written
        retrieve_*: [N, D], written; -1 on entry

    Raises: NotImplementedError: any other mask, which only GPU backends read.
    """
    N, D = verified_seq_len.numel(), draft_token_num
    parents = _parents(parent_list, selected_index, topk)
    retrieve_index.copy_(torch.arange(N * D, device=parents.device).view(N, D))
    _link(parents, retrieve_next_token, retrieve_next_sibling)
    visible, level = _ancestors(parents, depth)
    positions.view(-1)[: N * D] = (level + verified_seq_len[:, None]).flatten()
    cells = _mask_cells(verified_seq_len, D, tree_mask_mode)
    tree_mask.view(-1)[cells.flatten()] = visible.flatten().to(tree_mask.dtype)


def _parents(parent_list: Tensor, selected_index: Tensor, topk: int) -> Tensor:
    """The parent of each node, -1 for the root and where the parent was not selected: [N, D]."""
    group = selected_index // topk
    groups = pad(parent_list, (0, 1), value=-1)  # none beyond the last one
    candidate = groups.gather(1, group.clamp(max=groups.shape[1] - 1))
    same = candidate[:, :, None] == selected_index[:, None, :]
    place = torch.arange(1, same.shape[2] + 1, device=same.device)
    parent = torch.where(same, place, 0).amax(2) if same.numel() else group
    parent = torch.where(parent > 0, parent, -1)
    return pad(torch.where(group == 0, 0, parent), (1, 0), value=-1)


def _link(parents: Tensor, next_token: Tensor, next_sibling: Tensor) -> None:
    """Children and siblings in ascending order."""
    D = parents.shape[1]
    node = torch.arange(D, device=parents.device)
    child = parents[:, None, :] == node[:, None]  # [N, parent, node]
    first = torch.where(child, node, D).amin(2)
    next_token.copy_(torch.where(first < D, first, next_token))
    twin = (parents[:, :, None] == parents[:, None, :]) & (parents[:, :, None] >= 0)
    later = torch.where(twin & (node > node[:, None]), node, D).amin(2)
    next_sibling.copy_(torch.where(later < D, later, next_sibling))


def _ancestors(parents: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The nodes that each node sees, [N, D, D], and its depth, [N, D]."""
    N, D = parents.shape
    at = torch.arange(D, device=parents.device).repeat(N, 1)
    visible = torch.zeros(N, D, D, dtype=torch.bool, device=parents.device)
    visible[:, :, 0] = True
    level = torch.zeros_like(at)
    for _ in range(depth):
        visible.scatter_(2, at[:, :, None], True)
        level += at > 0
        at = parents.gather(1, at).clamp(min=0)
    return visible, level


def _mask_cells(verified_seq_len: Tensor, D: int, mode: int) -> Tensor:
    """Indices in the flat mask of each request's D x D cells: [N, D, D]."""
    if mode not in (FULL_MASK, QLEN_ONLY):
        raise NotImplementedError(f"build_tree_kernel_efficient_cpu: tree mask mode {mode}")
    prefix = verified_seq_len if mode == FULL_MASK else torch.zeros_like(verified_seq_len)
    node = torch.arange(D, device=prefix.device)
    width = prefix + D
    start = (width.cumsum(0) - width) * D + prefix
    return start[:, None, None] + width[:, None, None] * node[:, None] + node


@operator("predicts", "accept_index", "accept_token_num")
def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Follow each tree along the drafts that equal the target's own choice.

    Shapes:
        predicts: [N * D], written at the accepted nodes: the target's choice after each
        accept_index: [N, S], written: rows of the accepted nodes, the root's first; the rest stays
        accept_token_num: [N], written: accepted drafts, S - 1 at most
        candidates, target_predict: [N, D], the nodes' tokens and the target's choice after each
    """
    N, D = candidates.shape
    S = accept_index.shape[1]
    target = target_predict.flatten()
    request = torch.arange(N, device=candidates.device)
    last = retrive_index[:, 0]
    accepted = torch.zeros_like(last)
    accept_index[:, 0] = last.to(accept_index.dtype)
    node = retrive_next_token[:, 0]
    for _ in range(1, D):  # visits each draft once
        open_ = (node >= 0) & (accepted < S - 1)
        at = node.clamp(min=0)
        hit = open_ & (candidates[request, at] == target[last])
        accepted = accepted + hit
        last = torch.where(hit, retrive_index[request, at], last)
        accept_index[request[hit], accepted[hit]] = last[hit].to(accept_index.dtype)
        onward = torch.where(hit[:, None], retrive_next_token, retrive_next_sibling)
        node = torch.where(open_, onward[request, at], -1)
    accept_token_num.copy_(accepted)
    taken = torch.arange(S, device=last.device) <= accepted[:, None]
    rows = accept_index[taken].long()
    predicts.view(-1)[rows] = target[rows].to(predicts.dtype)
