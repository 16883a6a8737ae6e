"""The flags of speculation that cannot be served, refused before a worker starts."""

from importlib.metadata import entry_points

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from qwen3next_plugin.config import ConfigError, check_num_speculative_tokens
from qwen3next_plugin.engines.vllm import patches as request_params
from qwen3next_plugin.engines.vllm.cpu import page_copy

# Other ways to draft and to verify than ours would be ignored.
OURS = {
    "draft_sample_method": "greedy",
    "rejection_sample_method": "standard",
    "disable_padded_drafter_batch": False,  # nothing is padded: rejected tokens are left out
}


def check_speculation(vllm_config: VllmConfig) -> None:
    """Refuse what contradicts how drafts are made, verified and taken back here.

    Raises:
        ConfigError: naming the flag and the mend.
    """
    check_num_speculative_tokens(vllm_config.num_speculative_tokens)
    _check_page_copies(vllm_config)
    _check_logits_processors()
    for name, ours in OURS.items():
        value = getattr(vllm_config.speculative_config, name)
        if value != ours:
            raise ConfigError(
                f"{name} = {value}: a draft is the likeliest tokens, and is kept where it is what "
                f"is sampled without drafts; leave {name} at {ours}"
            )
    if current_platform.is_cpu() or vllm_config.use_v2_model_runner:  # V1 on a GPU drops them
        request_params.install(vllm_config.model_config.architecture)


def _check_page_copies(vllm_config: VllmConfig) -> None:
    """Refuse drafts where the host would shift the state pages that its prefix cache copies.

    Runner V2 asks the model how pages move. Runner V1 has no such seam: its kernels take a page for
    one of k + 1 states. It can go when no supported vLLM has that runner.
    """
    if page_copy.needed() or vllm_config.use_v2_model_runner:
        return
    if vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "speculative decoding with prefix caching: vLLM's model runner V1 copies this model's "
            "state pages wrongly; use runner V2 (VLLM_USE_V2_MODEL_RUNNER=1; vLLM's log says what "
            "keeps it from choosing V2), or --no-enable-prefix-caching, or no --speculative-config"
        )


def _check_logits_processors() -> None:
    """Refuse logits processors that are installed as plugins: vLLM leaves them out, and is silent.

    Those that a flag names it refuses itself. Can go when vLLM applies them under speculation.
    """
    if found := [entry.name for entry in entry_points(group="vllm.logits_processors")]:
        raise ConfigError(
            f"logits processors {', '.join(found)}: vLLM does not apply installed ones under "
            "speculative decoding, so drafts would change what is generated; uninstall them, or "
            "serve without --speculative-config"
        )
