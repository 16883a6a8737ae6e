"""The self-check compares the kernels that only Qwen4-Exp launches."""

import pytest
import torch

from examples.qwen4_exp_tiny import CONFIG
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.extras.self_check.cases import Served
from qwen3next_plugin.extras.self_check.checking import compare
from qwen3next_plugin.model.kinds import kind_of
from qwen3next_plugin.model.state import PageLayout

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drafts", [0, 1, 3, 8])
def test_its_kernels_agree(drafts, dtype):
    """Also without room for drafts, where a page has only what the next token reads."""
    config = Qwen3NextConfig.from_hf(CONFIG)
    layout = PageLayout.from_config(
        config, num_drafts=drafts, activation_dtype=dtype, state_dtype=torch.float32
    )
    served, kind = Served(config, layout, CPU), kind_of(config)
    assert kind is not None
    assert kind.cases(served, "cpu").keys() == {
        *("dilated_conv1d", "hyper_connection", "index_keys", "ngram_embedding", "ple_gate"),
        "select_blocks",
    }
    compare(served)
