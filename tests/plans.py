"""Memory of the released model under flags."""

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.plan import GIB, Flags
from qwen3next_plugin.model.checkpoint.sizes import parameters
from released import RELEASED_80B

CONFIG = Qwen3NextConfig.from_hf(RELEASED_80B)
COUNTS = parameters(CONFIG)
SIZES = {name: 2 * n for name, n in COUNTS.items()}


def flags(**changes):
    defaults = {
        "max_model_len": 32768,
        "max_num_seqs": 64,
        "num_speculative_tokens": 0,
        "dtype": "bfloat16",
        "state_dtype": "float32",
        "prefix_caching": True,
        "memory": 200 * GIB,
        "threads": 2,
    }
    return Flags(**(defaults | changes))
