"""Our checks and defaults, which vLLM calls while it completes a model's configuration."""

import sys

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from qwen3next_plugin import __version__
from qwen3next_plugin.engines.patching import Item
from qwen3next_plugin.engines.vllm import flags
from qwen3next_plugin.engines.vllm.names import DRAFTERS, LOGGER, SERVER, TRUNKS, models_here
from qwen3next_plugin.engines.vllm.patches import TABLE, When, apply
from qwen3next_plugin.engines.vllm.speculation import drafts_flags
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.versions import check_host

logger = init_logger(LOGGER)


class CheckFlags(VerifyAndUpdateConfig):
    """Called while vLLM completes the configuration of our model."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot be served, fill in defaults, and log what serves."""
        logger.info_once(
            "qwen3next_plugin %s serves this model on vLLM %s, with %s kernels",
            __version__,
            check_host("vllm"),
            described("cpu" if current_platform.is_cpu() else "cuda"),
        )
        flags.check(vllm_config)
        flags.complete(vllm_config)
        apply(When.CONFIGURED, When.GRAMMARS)
        if current_platform.is_cpu():
            apply(When.IN_ENGINE)
        if SERVER in sys.modules:  # else another program checks flags, without a server
            apply(When.IN_SERVER)
        # Runner V1 on a GPU applies neither min_p nor logit_bias to drafts.
        if vllm_config.speculative_config is not None and (
            current_platform.is_cpu() or vllm_config.use_v2_model_runner
        ):
            apply(When.WITH_DRAFTS)


class CheckDrafter(VerifyAndUpdateConfig):
    """Called while vLLM completes the configuration of our drafter, before that of the model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse drafts that cannot be made."""
        drafts_flags.check_drafter(model_config)


class SayNoKernels(VerifyAndUpdateConfig):
    """Called on a platform without our kernels, where vLLM's own model serves."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Log it."""
        logger.info_once(
            "qwen3next_plugin %s has no kernels for %s: vLLM %s keeps its own model",
            __version__,
            current_platform.device_name,
            check_host("vllm"),
        )


def after_hosts(
    architecture: str, ours: type[VerifyAndUpdateConfig]
) -> type[VerifyAndUpdateConfig]:
    """`ours` for this model, preceded by vLLM's own entry if it has one."""
    host = MODELS_CONFIG_MAP.get(architecture)
    if host is None:
        return ours

    class Both(VerifyAndUpdateConfig):
        """Called while vLLM completes the configuration of a model that it has an entry for."""

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            host.verify_and_update_config(vllm_config)
            ours.verify_and_update_config(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            host.verify_and_update_model_config(model_config)
            ours.verify_and_update_model_config(model_config)

    return Both


def _call_when_configured(
    group: When,
    architecture: str,
    check: type[VerifyAndUpdateConfig],
    reason: str,
    remove_when: str,
) -> None:
    if architecture in models_here():
        TABLE.add(
            Item(
                target="vllm.model_executor.models.config.MODELS_CONFIG_MAP",
                key=architecture,
                value=after_hosts(architecture, check),
                group=group,
                reason=reason,
                remove_when=remove_when,
            )
        )


for names, check in ((TRUNKS, CheckFlags), (DRAFTERS, CheckDrafter)):
    for name in names:
        _call_when_configured(
            When.REGISTERED,
            name,
            check,
            "flags must be checked before a worker starts; vLLM has no extension point for it",
            "a plugin's model class can check the configuration",
        )
for name in TRUNKS:
    _call_when_configured(
        When.NO_KERNELS,
        name,
        SayNoKernels,
        "the log must say that vLLM's own model serves",
        "there are kernels for every platform",
    )
