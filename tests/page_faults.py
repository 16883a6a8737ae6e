"""Page faults of tensors that are taken and freed, as the activations of a long prompt are."""

import ctypes
import resource

import torch

NBYTES = 24 << 20  # of a tensor
FEW, MANY = 100, 1000
PR_SET_THP_DISABLE = 41  # linux/prctl.h


def page_faults() -> int:
    """Those of this process when it takes and frees three tensors again, in small pages."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    for _ in range(2):  # the first may leave something small in the freed space
        _take()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _take()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _take() -> None:
    for tensor in [torch.empty(NBYTES, dtype=torch.uint8) for _ in range(3)]:
        tensor.fill_(1)
