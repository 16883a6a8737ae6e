"""MTP in vLLM's configuration: who drafts, how long, and what that rules out."""

from vllm.config import VllmConfig
from vllm.logger import init_logger

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.mtp.costs import Costs
from qwen3next_plugin.mtp.schedule import Fixed, Policy, Schedule

WORKER = "qwen3next_plugin.engines.vllm.worker.Worker"
FLOP_PER_BYTE = 10.0  # of a CPU

logger = init_logger("vllm.qwen3next_plugin")


def use_our_drafter(vllm_config: VllmConfig) -> None:
    """Have vLLM start our worker, which brings the drafter.

    Raises:
        ConfigError: a flag that contradicts how our drafter works.
    """
    speculative_config, parallel_config = (
        vllm_config.speculative_config,
        vllm_config.parallel_config,
    )
    if speculative_config.draft_sample_method != "greedy":
        raise ConfigError(
            f"draft_sample_method = {speculative_config.draft_sample_method!r}: drafts are the "
            f"likeliest tokens, which is lossless at every temperature; leave it out"
        )
    if speculative_config.disable_padded_drafter_batch:
        raise ConfigError(
            "disable_padded_drafter_batch: rejected tokens never reach the MTP layer here, "
            "nothing is padded; leave it out"
        )
    if parallel_config.data_parallel_size > 1 or parallel_config.worker_cls != "auto":
        logger.info("drafts are made by vLLM's own loop: it asks for equal passes on all ranks")
        return
    parallel_config.worker_cls = WORKER


def make_schedule(config: Qwen3NextConfig, max_draft: int) -> Policy:
    """The policy that the environment asks for."""
    if env.drafts() == "fixed":
        return Fixed(max_draft)
    return Schedule(max_draft, Costs.from_config(config, FLOP_PER_BYTE))
