"""Memory that SGLang's pools have for an indexer's keys, as it is planned."""

from types import SimpleNamespace as Bag

from examples.qwen4_exp_tiny import CONFIG
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.plan import GIB, Flags, make_plan
from qwen3next_plugin.engines.sglang.pools import Pools


def test_rows_of_kv_have_room_for_an_indexers_keys():
    """As wide as SGLang's pool is made: beside keys, and beside values."""
    from qwen3next_plugin.engines.sglang.hooks import set_sizes

    flags = Flags(
        max_model_len=1024,
        max_num_seqs=4,
        num_speculative_tokens=1,
        dtype="float32",
        state_dtype="float32",
        prefix_caching=True,
        memory=GIB,
        threads=1,
    )
    for tp_size, heads in ((1, 2), (2, 1)):
        hf_config = Bag(**CONFIG | {"architectures": ["Qwen4ExpForCausalLM"]})
        hf_config.to_dict = lambda: dict(CONFIG)
        model_config = set_sizes(None, Bag(hf_config=hf_config, head_dim=32), None, tp_size)
        plan = make_plan(Pools, Qwen3NextConfig.from_hf(CONFIG, tp_size=tp_size), {}, flags)
        width = model_config.head_dim + model_config.v_head_dim
        assert plan.kv_bytes_per_layer == 4 * heads * width
        assert heads * (model_config.head_dim - 32) >= CONFIG["indexer_head_dim"]
