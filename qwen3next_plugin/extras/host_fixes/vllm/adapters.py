"""LoRA adapters: parts that vLLM would ignore are an error."""

from collections.abc import Callable
from typing import Any

from vllm.distributed import get_pp_group

from qwen3next_plugin.engines.vllm.patches import When, patch


@patch(
    When.WITH_LORA,
    "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter",
    reason="vLLM ignores the parts of an adapter that fit no module",
    remove_when="vLLM refuses such an adapter (`compat`)",
    upstream="https://github.com/vllm-project/vllm/issues/34186",
)
def refuse_unused(host: Callable[..., Any], worker: Any, request: Any) -> Any:
    """Around the reading of an adapter: refuse one with a part that fits no module.

    vLLM compares only the last part of a module's name, and ignores what it does not find. If an
    adapter of that name is loaded already, it stays.

    Raises:
        ValueError: naming the module, and those that take adapters.
    """
    adapter, manager = host(worker, request), worker._adapter_manager
    if get_pp_group().world_size > 1:  # a stage has some of the layers only
        return adapter
    known = {
        *manager.modules,
        *(name for names in manager.packed_modules.values() for name in names),
    }
    experts = ".base_layer"  # the other half of an adapter of fused experts
    if unused := sorted(name for name in adapter.loras if name.removesuffix(experts) not in known):
        taken = manager.lora_config.target_modules
        taken = taken or {name.rpartition(".")[2] for name in manager.modules}
        raise ValueError(
            f"the adapter changes {len(unused)} modules that take no adapter here, the first is "
            f"{unused[0]}: use one of this model that changes {', '.join(sorted(taken))} only"
        )
    return adapter
