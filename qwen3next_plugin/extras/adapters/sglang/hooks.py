"""Where SGLang makes its manager of adapters."""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.names import is_ours
from qwen3next_plugin.engines.sglang.patches import When, patch


@patch(
    When.ON_CPU,
    "sglang.srt.model_executor.model_runner.ModelRunner.init_lora_manager",
    reason="SGLang's layers with adapters pin memory, which fails without a GPU, and do not "
    "load adapters of in_proj_qkv, z, b and a",
    remove_when="SGLang serves adapters of Qwen3.5 on a CPU",
    upstream="https://github.com/sgl-project/sglang/issues/31894",
)
def make_adapters(host: Callable[[Any], None], runner: Any) -> None:
    """Use our manager of LoRA adapters for our model."""
    if not is_ours(runner.model_config):
        host(runner)
        return
    from qwen3next_plugin.extras.adapters.sglang.manager import Adapters

    runner.lora_manager = Adapters(runner)
