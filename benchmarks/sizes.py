"""The table of docs/models.md: what each released size takes, by plan; measures nothing.

It is planned from examples/configs/, and written by python -m benchmarks.render.
"""

from dataclasses import replace
from pathlib import Path

from benchmarks.report import text
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.plan import GIB, Flags, make_plan
from qwen3next_plugin.engines.sglang.pools import Pools
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.model.checkpoint.sizes import DTYPES, served_bytes

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
MIB = 2**20
ROOM = 64 * GIB  # next to the weights
FLAGS = Flags(
    max_model_len=32768,
    max_num_seqs=2**20,
    num_speculative_tokens=3,
    dtype="bfloat16",
    state_dtype="float32",
    prefix_caching=True,
    memory=0,
    threads=1,
)
# Folder of a config → the models of its size.
RELEASED = {
    "Qwen3-Next-80B-A3B": "Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
    "Qwen3.5-0.8B": "Qwen3.5-0.8B",
    "Qwen3.5-2B": "Qwen3.5-2B",
    "Qwen3.5-4B": "Qwen3.5-4B",
    "Qwen3.5-9B": "Qwen3.5-9B",
    "Qwen3.6-27B": "Qwen3.5-27B, 3.6-27B, 3.8-27B",
    "Qwen3.6-35B-A3B": "Qwen3.5-35B-A3B, 3.6-35B-A3B",
    "Qwen3.5-122B-A10B": "Qwen3.5-122B-A10B",
    "Qwen3.5-397B-A17B": "Qwen3.5-397B-A17B",
    "Qwen3.8-Flash-Next": "Qwen3.8-Flash-Next",
    "Qwen3.8-2.4T-A95B": "Qwen3.8-2.4T-A95B",
}
COLUMNS = (
    "model",
    "weights, GiB",
    "state, MiB",
    "KV, MiB",
    "requests, vLLM",
    "requests, SGLang",
)


def table() -> tuple[list[str], list[list[str]]]:
    """Head and rows."""
    return list(COLUMNS), [[name, *_row(CONFIGS / folder)] for folder, name in RELEASED.items()]


def _row(folder: Path) -> list[str]:
    config = Qwen3NextConfig.from_hf(read_config(folder))
    loaded = served_bytes(config, DTYPES[FLAGS.dtype], asked=None)
    weights = sum(make_plan(Blocks, config, loaded, FLAGS).weights.values())
    flags = replace(FLAGS, memory=weights + ROOM)
    vllm, sglang = (make_plan(engine, config, loaded, flags) for engine in (Blocks, Pools))
    cells = (
        weights / GIB,
        vllm.state_bytes_per_slot / MIB,
        1024 * vllm.kv_bytes_per_token / MIB,
        vllm.fits,
        sglang.fits,
    )
    return [text(cell) for cell in cells]
