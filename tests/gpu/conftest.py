"""How many GPUs a server test uses."""

import pytest
import torch


@pytest.fixture(
    params=[pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multi_gpu)]
)
def gpus(request):
    """The number of GPUs to serve on; skips if the machine has fewer."""
    found = torch.cuda.device_count()
    if found < request.param:
        pytest.skip(f"needs {request.param} GPU(s), found {found}")
    return request.param
