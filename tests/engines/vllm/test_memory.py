"""What state costs: one page a request and linear layer under speculation, all given back."""

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.vllm.offline import Offline
from page_faults import FEW

pytestmark = pytest.mark.serve

# The released model's heads, on a small trunk: pages, and the KV that pads them, are as large.
RELEASED = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_hidden_layers": 4,
}
PROMPTS = [random_prompt(n, seed=6) for n in range(5, 165, 10)]
FLAGS = {
    "dtype": "bfloat16",
    "mamba_ssm_cache_dtype": "float32",  # for vLLM's own model too, whose default is bfloat16
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 1 << 30,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("released"), **RELEASED)


def test_one_page_each_where_upstream_takes_four_states(released):
    """Without prefix caching, which vLLM's own model cannot have beside MTP on a CPU."""
    engine = Offline(released, enable_prefix_caching=False, **FLAGS)
    try:
        pages = engine.inside("pages", PROMPTS, 24)
        ours, upstream = engine.inside("state_bytes")
        faults = engine.inside("faults")
    finally:
        engine.close()
    assert pages == {"held": {1}, "running": 16, "in_use": 0}
    assert ours <= 0.3 * upstream
    assert faults < FEW  # malloc keeps what a step frees


def test_files_in_memory_are_free(grant):
    """In a systemd unit of 1 GiB, full of a checkpoint's files."""
    from vllm.utils import cpu_resource_utils as resources

    from qwen3next_plugin.engines.vllm.patches import When, apply

    apply(When.IN_WORKER)
    grant("0::/\n", {})
    assert resources.get_cgroup_memory_limit() is None
    assert resources.get_cgroup_memory_usage() is None
    files = {"memory.max": 1 << 30, "memory.current": 1000 << 20}
    grant("0::/unit\n", {f"unit/{name}": f"{nbytes}\n" for name, nbytes in files.items()})
    grant("0::/unit\n", {"unit/memory.stat": f"active_file 5\ninactive_file {700 << 20}\n"})
    node = resources.get_memory_node_info()
    assert (node.total_memory, node.available_memory) == (1 << 30, (724 << 20) + 5)
