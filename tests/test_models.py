"""Every released size: its config is read, with the parameters that were published."""

from itertools import product

import pytest
import torch

from benchmarks.sizes import CONFIGS, RELEASED, ROOM
from plans import flags
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.plan import make_plan
from qwen3next_plugin.engines.sglang.pools import Pools
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.model.checkpoint.sizes import parameters

# Parameters of a release's files, which hold an MTP layer and, but for the last, a vision tower.
PUBLISHED = {
    "Qwen3.5-0.8B": 873_438_784,
    "Qwen3.5-2B": 2_274_069_824,
    "Qwen3.5-4B": 4_659_865_088,
    "Qwen3.5-9B": 9_653_104_368,
    "Qwen3.6-27B": 27_781_427_952,
    "Qwen3.6-35B-A3B": 35_951_822_704,
    "Qwen3.5-122B-A10B": 125_086_497_008,
    "Qwen3.5-397B-A17B": 403_397_928_944,
    "Qwen3.8-2.4T-A95B": 2_446_182_725_504,
}
# Towers that are not of transformers' default size: that of 9B and more.
SMALLER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
TOWERS = {
    "Qwen3.5-0.8B": {"depth": 12, "hidden_size": 768, "intermediate_size": 3072},
    "Qwen3.5-2B": SMALLER,
    "Qwen3.5-4B": SMALLER,
}


def test_each_config_is_in_the_table():
    assert {path.name for path in CONFIGS.iterdir()} == RELEASED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    config = Qwen3NextConfig.from_hf(read_config(CONFIGS / name))
    total = sum(parameters(config).values())
    if name != "Qwen3.8-2.4T-A95B":
        from transformers.models.qwen3_5 import modeling_qwen3_5 as vision

        size = TOWERS.get(name, {})
        settings = vision.Qwen3_5VisionConfig(out_hidden_size=config.hidden_size, **size)
        with torch.device("meta"):
            tower = vision.Qwen3_5VisionModel(settings)
        total += sum(p.numel() for p in tower.parameters())
    assert total == PUBLISHED[name]


def test_pools_hold_what_is_next_to_the_weights():
    config = Qwen3NextConfig.from_hf(read_config(CONFIGS / "Qwen3.6-27B"))
    for cached, length in product((True, False), (1, 4096, 262144)):
        asked = flags(prefix_caching=cached, max_model_len=length, memory=ROOM)
        p = make_plan(Pools, config, {}, asked)
        used = (p.slots + 1) * p.slot_bytes + p.tokens * p.kv_bytes_per_token
        assert p.spare - p.kv_bytes_per_token < used <= p.spare
        assert p.concurrency * length <= p.tokens
        assert p.concurrency * p.slots_per_request <= p.slots
        one_more = make_plan(Blocks, config, {}, asked)
        assert one_more.state_bytes_per_slot == p.state_bytes_per_slot <= p.slot_bytes
