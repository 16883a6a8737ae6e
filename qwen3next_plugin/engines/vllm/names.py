"""Names by which vLLM knows the plugin's parts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

PACKAGE = "qwen3next_plugin.engines.vllm"
TRUNK, DRAFTER = ARCHITECTURES = ("Qwen3NextForCausalLM", "Qwen3NextMTP")  # in vLLM's registry
BACKEND_NAME = "QWEN3NEXT_GDN"  # the linear-attention backend
OPAQUE_OP = "vllm::qwen3next_gated_delta_net"  # a linear layer between its projections
WORKER = f"{PACKAGE}.speculation.worker.Worker"
SCHEDULER = f"{PACKAGE}.speculation.scheduler.Scheduler"

LOGGER = "vllm.qwen3next_plugin"  # vLLM formats the loggers whose name begins so


def is_ours(model_config: "ModelConfig") -> bool:
    """Whether the plugin serves this model."""
    return model_config.architecture in ARCHITECTURES
