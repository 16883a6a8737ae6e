"""vLLM's flags for drafts: refusals and defaults."""

from collections.abc import Callable
from copy import copy
from importlib.metadata import entry_points
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils.import_utils import resolve_obj_by_qualname

from qwen3next_plugin.config import (
    ConfigError,
    Qwen3NextConfig,
    check_num_draft_layers,
    check_num_speculative_tokens,
    host_rope,
    rope,
)
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm import metrics
from qwen3next_plugin.engines.vllm.cpu import page_copy
from qwen3next_plugin.engines.vllm.names import OVERRIDE_FLAG, SCHEDULER, is_ours, serves
from qwen3next_plugin.engines.vllm.patches import When, patch


def check_drafter(model_config: ModelConfig) -> None:
    """Refuse drafts of a model without an MTP layer, before vLLM divides by their number."""
    config = Qwen3NextConfig.from_hf(model_config.hf_config, override_flag=OVERRIDE_FLAG)
    check_num_draft_layers(config, "--speculative-config")


def check_drafts(vllm_config: VllmConfig) -> None:
    """Refuse drafts that are not the MTP layer's, or not lossless with what is installed.

    Raises:
        ConfigError: names the flag and the fix.
    """
    if vllm_config.speculative_config is None:
        return
    _check_method(vllm_config)
    check_num_speculative_tokens(vllm_config.num_speculative_tokens)
    _check_state(vllm_config)
    _check_processors()
    if current_platform.is_cpu():
        _check_scheduler(vllm_config.scheduler_config.scheduler_cls)


@override(
    "vllm.config.speculative.SpeculativeConfig.draft_model_config",
    reason="vLLM removes images' axes from a text model's positions, not from its drafter's",
    remove_when="the drafter's configuration is completed as the trunk's is",
)
def align_drafter(vllm_config: VllmConfig) -> None:
    """Give the drafter the model's overridden RoPE and its longest context.

    For a text model positions have one axis, as in vLLM's trunk.
    """
    speculative_config, model_config = vllm_config.speculative_config, vllm_config.model_config
    if speculative_config is None or not serves(speculative_config.draft_model_config.hf_config):
        return
    text_config, draft_config = model_config.hf_text_config, speculative_config.draft_model_config
    left_out = () if model_config.uses_mrope else rope.OF_IMAGES
    parameters = text_config.rope_parameters.items()
    drafter = draft_config.hf_text_config
    host_rope.put(drafter, {name: value for name, value in parameters if name not in left_out})
    drafter.max_position_embeddings = text_config.max_position_embeddings
    if speculative_config.max_model_len is None:
        draft_config.max_model_len = model_config.max_model_len


def choose_metrics(vllm_config: VllmConfig) -> None:
    """Register our metrics, and our scheduler unless a flag names another."""
    metrics.remove()
    metrics.install(vllm_config)
    if vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER


def _check_method(vllm_config: VllmConfig) -> None:
    """Refuse other drafters."""
    if (method := vllm_config.speculative_config.method) != "mtp":
        raise ConfigError(
            f"--speculative-config: method {method}: the plugin drafts with the MTP layer alone; "
            f'use {{"method": "mtp", "num_speculative_tokens": 3}}, or QWEN3NEXT_DISABLE=1'
        )


def _check_state(vllm_config: VllmConfig) -> None:
    """Refuse drafts if vLLM's prefix cache would copy state pages with an offset.

    Runner V2 asks the model how to copy pages. Runner V1 with Triton does not, and treats a page as
    one of several states per request. Remove when no supported vLLM has runner V1.
    """
    if page_copy.needed() or vllm_config.use_v2_model_runner:
        return
    if vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "speculative decoding with prefix caching: vLLM's model runner V1 copies this model's "
            "state pages wrongly; use runner V2 (VLLM_USE_V2_MODEL_RUNNER=1; vLLM's log says what "
            "keeps it from choosing V2), or --no-enable-prefix-caching, or no --speculative-config"
        )


def _check_processors() -> None:
    """Refuse logits processors that vLLM would ignore."""
    # vLLM refuses those that a flag names, and silently drops installed ones. Remove when it
    # applies them under speculation.
    if found := [entry.name for entry in entry_points(group="vllm.logits_processors")]:
        raise ConfigError(
            f"logits processors {', '.join(found)}: vLLM does not apply installed ones under "
            "speculative decoding, so drafts would change what is generated; uninstall them, or "
            "serve without --speculative-config"
        )


def _check_scheduler(scheduler: str | type[Any] | None) -> None:
    """Refuse a scheduler that treats drafts or streaming input by vLLM's rules."""
    if scheduler is None:
        return
    ours, given = (
        resolve_obj_by_qualname(found) if isinstance(found, str) else found
        for found in (SCHEDULER, scheduler)
    )
    if not issubclass(given, ours):
        raise ConfigError(
            f"scheduler_cls = {scheduler}: with drafts, make it a subclass of {SCHEDULER}"
        )


@patch(
    When.WITH_DRAFTS,
    "vllm.sampling_params.SamplingParams._validate_spec_decode",
    reason="vLLM's rejection sampler lacks min_p and logit_bias, so vLLM refuses requests with "
    "them; our verification applies both",
    remove_when="vLLM refuses neither (a test marked `compat` says when)",
    upstream="https://github.com/vllm-project/vllm/issues/42744",
)
def allow_min_p_and_logit_bias(
    host: Callable[..., None], params: SamplingParams, speculative_config: Any
) -> None:
    """Hide both from vLLM's check, for our model."""
    if speculative_config is not None and is_ours(speculative_config.target_model_config):
        params = copy(params)
        params.min_p, params.logit_bias = 0.0, None
    host(params, speculative_config)
