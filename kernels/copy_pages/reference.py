"""Page copies as their equation."""

from torch import Tensor


def copy_pages(pages_: Tensor, source: Tensor, target: Tensor, mask: Tensor) -> None:
    """Shapes as in the public op."""
    copied = mask & (source >= 0) & (target >= 0)
    pages_[:, target[copied].long()] = pages_[:, source[copied].long()]
