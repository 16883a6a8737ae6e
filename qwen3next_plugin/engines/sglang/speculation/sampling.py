"""Sampling on CPU: its limits, and the verification of a tree of drafts at any temperature.

SGLang has these as GPU kernels only, and verifies greedily on CPU whatever the temperature. Names
are those of its kernels, so that `eagle_sample` can call either.
"""

import torch
from torch import Tensor

FIRST_WIDTH = 256  # how many of the most probable tokens are looked at first


def top_k_renorm_prob(probs: Tensor, limits: Tensor) -> Tensor:
    """What top_k, top_p and min_p leave of each row, renormalised; of equals those of lower index.

    As in SGLang's plain sampler on a CPU, each measures the row as it came: top_p keeps a token
    where those before it hold no more than top_p, min_p where it has that share of the largest.

    Shapes:
        probs: [N, V], rows that sum to 1
        limits: [N, 3] of top_k, top_p and min_p; V and more, 1 and 0 limit nothing
        returns [N, V]; probs itself where no row changes
    """
    top_k, top_p, min_p = limits.unbind(1)
    limited = ((top_k < probs.shape[1]) | (top_p < 1) | (min_p > 0)).nonzero().flatten()
    if not limited.numel():
        return probs
    rows = probs if len(limited) == len(probs) else probs[limited]
    kept = _keep(rows, *_within(rows, limits[limited]))
    return kept if len(kept) == len(probs) else probs.index_copy(0, limited, kept)


def _within(probs: Tensor, limits: Tensor) -> tuple[torch.return_types.topk, Tensor]:
    """Each row's largest probabilities, descending, and how many of them the limits keep."""
    V = probs.shape[1]
    top_k, top_p, min_p = limits[:, :, None].unbind(1)
    width = min(FIRST_WIDTH, V)
    while True:
        largest = probs.topk(width)
        values = largest.values
        kept = torch.arange(width, device=probs.device) < top_k
        kept &= values.cumsum(1) - values <= top_p
        kept &= values >= values[:, :1] * min_p.to(values.dtype)
        if width == V or not kept[:, -1].any():  # nor any behind it
            return largest, kept.sum(1).clamp(min=1)
        width = min(8 * width, V)


def _keep(probs: Tensor, largest: torch.return_types.topk, sizes: Tensor) -> Tensor:
    """The `sizes` most probable tokens of each row, renormalised; `largest` reaches as far."""
    values, tokens = largest
    least = values.gather(1, sizes[:, None] - 1)
    above = torch.where(values > least, values, 0)
    kept = torch.zeros_like(probs).scatter_(1, tokens, above)
    # Of those that equal the least, which topk gives in any order, the first ones.
    row, token = (probs == torch.where(least > 0, least, -1)).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(probs))
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    first = rank < (sizes - (above > 0).sum(1))[row]
    kept[row[first], token[first]] = least[row[first], 0]
    return kept.div_(kept.sum(1, keepdim=True))


def tree_speculative_sampling_target_only(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Walk down each tree by rejection sampling, and sample one more token behind what it accepts.

    At each node one coin is held against its children in turn: a child is accepted where the coin
    is below the target's probability of it and its elder siblings. Where none is, the token comes
    from what the target's distribution leaves without them. With both thresholds 1 the tokens are
    distributed as the target's own samples, whatever the tree; lower ones accept more.

    Shapes: N requests, D nodes a tree, node 0 the last committed token
        predicts: [N * D], written at the accepted nodes: the token that follows each
        accept_index: [N, S], written: rows of the accepted nodes, the root's first; the rest stays
        accept_token_num: [N], written: accepted drafts, S - 1 at most
        candidates: [N, D], the nodes' tokens; retrive_*: [N, D], a node's row in the batch, its
            first child and its next sibling, -1 where there is none
        uniform_samples: [N, D] in [0, 1), each node's coin; ..._for_final_sampling: [N]
        target_probs: [N, D, V]; draft_probs: [N, D, V], zeros, written where a draft is rejected

    Raises: ValueError: a distribution without positive probability, or with NaN.

    Source: Leviathan et al. 2023, section 2.3, with a draft distribution of one token at a time.
    """
    N, D = candidates.shape
    S = accept_index.shape[1]
    request = torch.arange(N, device=candidates.device)
    parent = torch.zeros_like(request)  # the node whose children the coin is held against
    coin, mass = uniform_samples[:, 0], torch.zeros_like(uniform_samples[:, 0])
    last, accepted = retrive_index[:, 0], torch.zeros_like(request)
    accept_index[:, 0] = last.to(accept_index.dtype)
    node = retrive_next_token[:, 0]
    for _ in range(1, D):  # each draft is looked at once
        open_ = (node >= 0) & (accepted < S - 1)
        at = node.clamp(min=0)
        token = candidates[request, at]
        probability = target_probs[request, parent, token]
        # Nothing where an elder sibling is the same token: it was rejected.
        chance = (probability - draft_probs[request, parent, token]).clamp(min=0)
        mass = mass + chance
        likely = (coin < mass / threshold_acc) | (chance >= threshold_single)
        hit, miss = open_ & likely, open_ & ~likely
        draft_probs[request[miss], parent[miss], token[miss]] = probability[miss]
        predicts[last[hit]] = token[hit].to(predicts.dtype)
        accepted = accepted + hit
        last = torch.where(hit, retrive_index[request, at], last)
        accept_index[request[hit], accepted[hit]] = last[hit].to(accept_index.dtype)
        parent, mass = torch.where(hit, at, parent), torch.where(hit, 0, mass)
        coin = torch.where(hit, uniform_samples[request, at], coin)
        onward = torch.where(hit[:, None], retrive_next_token, retrive_next_sibling)
        node = torch.where(open_, onward[request, at], -1)
    accept_token_num.copy_(accepted)
    target = target_probs[request, parent]
    token = _sample(target, draft_probs[request, parent], uniform_samples_for_final_sampling)
    predicts[last] = token.to(predicts.dtype)


def _sample(target: Tensor, rejected: Tensor, coin: Tensor) -> Tensor:
    """A token of each row from what `target` holds beyond `rejected`: [N]."""
    reached = (target - rejected).clamp_(min=0).cumsum(1, dtype=torch.float64)
    empty = ~(reached[:, -1] > 0)
    if empty.any():
        # Rounding may reject drafts that hold all of the probability; then any of them is as good.
        reached[empty] = target[empty].cumsum(1, dtype=torch.float64)
    total = reached[:, -1:]
    if not (total > 0).all():
        raise ValueError("tree_speculative_sampling_target_only: target_probs without probability")
    # Below the total, so that the token found is one that adds to the sum.
    wanted = (coin.double()[:, None] * total).clamp(max=total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(reached, wanted, right=True).flatten()
