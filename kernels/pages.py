"""The state pages of one linear-attention layer, as its kernels take them."""

from typing import NamedTuple

from torch import Tensor


class StatePool(NamedTuple):
    """Views of every page of a layer; dim 0 is the slot. See docs/state.md.

    Within a slot a view is contiguous. An op that updates pages names the argument `pool_`.

    Shapes, with W = GRID + num_drafts and ring = 4 + num_drafts:
        state [slots, HV, K, V] fp32 or bf16  S at the last multiple of GRID up to `start`
        key   [slots, W, H, K] fp32           L2-normalised key of each token since
        u     [slots, W, HV, V] fp32          corrected value of that token
        g     [slots, W, HV] fp32             log decay of that token; position p is at p % W
        span  [slots, 2] int32                (start, end): context lengths the page can continue at
        conv  [slots, ring, C]                convolution inputs [q; k; v]; p is at p % ring
    """

    state: Tensor
    key: Tensor
    u: Tensor
    g: Tensor
    span: Tensor
    conv: Tensor
