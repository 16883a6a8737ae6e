"""How many GPUs a server test uses."""

import pytest

from needs import need


@pytest.fixture(
    params=[pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multi_gpu)]
)
def gpus(request):
    """The number of GPUs to serve on; skips if the machine has fewer."""
    need("gpu" if request.param == 1 else "two-gpus")
    return request.param
