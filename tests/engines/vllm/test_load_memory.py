"""Loading takes little more memory than the packed weights: there is never a second whole copy."""

import os
import sys

import pytest
import torch

from checkpoints import write_checkpoint
from engines.vllm.offline import Offline
from quantised import write_quantised

pytestmark = [
    pytest.mark.serve,
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

# 1 GB in bf16; a layer, which is packed beside the others, has 2.5 % of it. A released model's
# tensors are larger still: of small ones more pages are shared, and stay mapped.
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 40,
    "num_experts": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
MOST = 1.15  # of the packed weights' bytes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    return write_checkpoint(folder, mtp=False, dtype=torch.bfloat16, **LARGE)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "fp8-blocks", "packed_4-bit"])
def test_peak_of_loading(plain, tmp_path, kind):
    env, folder = {"QWEN3NEXT_BATCH_INVARIANT": "1"}, plain  # which packs bf16, too
    if kind.startswith("int"):
        env["QWEN3NEXT_QUANTISE"] = kind
    elif kind != "bf16":
        folder = write_quantised(plain, tmp_path, kind)[0]
    os.sync()  # pages that are not on disk yet cannot be given back
    flags = {"dtype": "bfloat16", "max_model_len": 512}
    engine = Offline(folder, env=env, first="load_memory", **flags)
    try:
        found = engine.inside("load_memory")
    finally:
        engine.close()
    ratio = found["peak"] / found["weights"]
    print(f"{kind}: {found['weights'] / 2**20:.0f} MiB of weights, peak {ratio:.3f} of that")
    assert found["weights"] > 100 << 20
    assert ratio <= MOST
