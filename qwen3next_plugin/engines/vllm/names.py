"""Names by which vLLM knows the plugin's parts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen3next_plugin.engines import extras

if TYPE_CHECKING:
    from vllm.config import ModelConfig

PACKAGE = "qwen3next_plugin.engines.vllm"
# In vLLM's registry: the text models, those that have a vision tower around one, and the drafters.
TEXT_MODELS: Mapping[str, str] = {
    "Qwen3NextForCausalLM": f"{PACKAGE}.model.trunk:Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM": f"{PACKAGE}.model.trunk:Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM": f"{PACKAGE}.model.trunk:Qwen3_5ForCausalLM",
}
WRAPPERS: Mapping[str, str] = {
    name: f"{PACKAGE}.model.wrapped:{name}"
    for name in ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
}
FAMILY_DRAFTERS: Mapping[str, str] = dict.fromkeys(
    ("Qwen3NextMTP", "Qwen3_5MTP", "Qwen3_5MoeMTP"), f"{PACKAGE}.model.mtp:Qwen3NextMTP"
)
TRUNKS, DRAFTERS = {**TEXT_MODELS, **WRAPPERS}, {**FAMILY_DRAFTERS}
for models in extras.models("vllm"):
    TRUNKS |= models.trunks
    DRAFTERS |= models.drafters
MODELS = {**TRUNKS, **DRAFTERS}
ON_CPU = MODELS.keys() - {*TEXT_MODELS, *WRAPPERS, *FAMILY_DRAFTERS}  # where alone we serve them
BACKEND_NAME = "QWEN3NEXT_GDN"  # the linear-attention backend
OPAQUE_OP = "vllm::qwen3next_gated_delta_net"  # a linear layer between its projections
QUANTISATION = "qwen3next"  # of every quantised checkpoint of ours, on a CPU
WORKER = f"{PACKAGE}.speculation.worker.Worker"
SCHEDULER = f"{PACKAGE}.scheduler.Scheduler"
EXECUTOR = f"{PACKAGE}.executor.Executor"
# In the modules of a process that is an engine's; a server's.
ENGINE = "vllm.v1.engine.core"
SERVER = "vllm.entrypoints.launchers.api_server.entry"
OVERRIDE_FLAG = "--hf-overrides"

HANDOVER = "NixlConnector"  # between a server that reads prompts and one that decodes

LOGGER = "vllm.qwen3next_plugin"  # vLLM formats the loggers whose name begins so


def models_here() -> dict[str, str]:
    """The models that the plugin serves on this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return MODELS
    return {name: model for name, model in MODELS.items() if name not in ON_CPU}


def is_ours(model_config: "ModelConfig") -> bool:
    """Whether the plugin serves this model."""
    return model_config.architecture in models_here()


def serves(hf_config: Any) -> bool:
    """Whether the plugin serves the model of a config that vLLM has only read."""
    return not models_here().keys().isdisjoint(hf_config.architectures or ())
