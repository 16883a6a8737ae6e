"""Sampling on a CPU: limits on a distribution, and verification of draft trees at any temperature.

SGLang has these as GPU kernels only, and on a CPU verifies greedily at every temperature. The names
are those of its kernels, so that `eagle_sample` can call either.
"""

import torch
from torch import Tensor

FIRST_WIDTH = 256  # the number of most probable tokens to look at first


def top_k_renorm_prob(probs: Tensor, limits: Tensor) -> Tensor:
    """Apply top_k, top_p and min_p to each distribution and renormalise; ties keep lower token ids.

    As in SGLang's plain sampler on a CPU, each limit is measured on the unlimited distribution:
    top_p keeps a token if more probable tokens sum to at most top_p, min_p if the token has at
    least that share of the largest probability.

    Shapes:
        probs [N, V], each row sums to 1
        limits [N, 3] of top_k, top_p and min_p; top_k >= V, top_p = 1 and min_p = 0 limit nothing
        returns [N, V]; probs itself if nothing is limited
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
        if width == V or not kept[:, -1].any():  # then none after it is kept either
            return largest, kept.sum(1).clamp(min=1)
        width = min(8 * width, V)


def _keep(probs: Tensor, largest: torch.return_types.topk, sizes: Tensor) -> Tensor:
    """The `sizes` most probable tokens of each row, renormalised; `largest` has at least those."""
    values, tokens = largest
    least = values.gather(1, sizes[:, None] - 1)
    above = torch.where(values > least, values, 0)
    kept = torch.zeros_like(probs).scatter_(1, tokens, above)
    # Ties at the least kept value, which topk returns in any order: keep the lowest token ids.
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
    """Walk down each tree by rejection sampling, then sample one more token after the last accept.

    Each node has one coin, which is compared with its children in turn: a child is accepted if the
    coin is below the target probability of it and its elder siblings together. If no child is
    accepted, the next token is sampled from the target distribution without the children. With
    both thresholds 1 the tokens are distributed as samples of the target, whatever the tree is;
    lower thresholds accept more.

    Shapes: N requests, D nodes in each tree, node 0 is the last committed token
        predicts [N * D], written at the accepted nodes: the token that follows each
        accept_index [N, S], written: logit rows of the accepted nodes, the root first
        accept_token_num [N], written: the number of accepted drafts, at most S - 1
        candidates [N, D], the nodes' tokens
        retrive_index, _next_token, _next_sibling [N, D], a node's logit row, its first child and
            its next sibling, or -1
        uniform_samples [N, D] in [0, 1), each node's coin; ..._for_final_sampling [N]
        target_probs [N, D, V]
        draft_probs [N, D, V], zeros; written where a draft is rejected

    Raises:
        ValueError: a distribution without positive probability, or with NaN.

    Source: Leviathan et al. 2023, section 2.3, with a draft distribution of one token at a time.
    """
    N, D = candidates.shape
    S = accept_index.shape[1]
    request = torch.arange(N, device=candidates.device)
    parent = torch.zeros_like(request)  # the node whose children the coin is compared with
    coin, mass = uniform_samples[:, 0], torch.zeros_like(uniform_samples[:, 0])
    last, accepted = retrive_index[:, 0], torch.zeros_like(request)
    accept_index[:, 0] = last.to(accept_index.dtype)
    node = retrive_next_token[:, 0]
    for _ in range(1, D):  # each draft is visited at most once
        open_ = (node >= 0) & (accepted < S - 1)
        at = node.clamp(min=0)
        token = candidates[request, at]
        probability = target_probs[request, parent, token]
        # Zero if an elder sibling has the same token: that was rejected.
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
    """Sample a token of each row from `target` without `rejected`: [N]."""
    reached = (target - rejected).clamp_(min=0).cumsum(1, dtype=torch.float64)
    empty = ~(reached[:, -1] > 0)
    if empty.any():
        # By rounding, the rejected drafts may hold all of the probability: then sample from them.
        reached[empty] = target[empty].cumsum(1, dtype=torch.float64)
    total = reached[:, -1:]
    if not (total > 0).all():
        raise ValueError("tree_speculative_sampling_target_only: target_probs without probability")
    # Below the total, so that the token found has a positive probability.
    wanted = (coin.double()[:, None] * total).clamp(max=total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(reached, wanted, right=True).flatten()
