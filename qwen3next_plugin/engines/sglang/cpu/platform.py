"""SGLang's platform without a GPU: its own CPU platform, with our checks and defaults."""

from typing import Any

from sglang.srt.platforms.cpu import CpuSRTPlatform

from qwen3next_plugin import __version__
from qwen3next_plugin.engines.sglang import flags
from qwen3next_plugin.engines.sglang.cpu.environment import use_cpu
from qwen3next_plugin.engines.sglang.names import is_loaded_last, is_ours, logger
from qwen3next_plugin.engines.sglang.plugin import register
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.model.checkpoint import progress
from qwen3next_plugin.model.checkpoint.mapped import keep_freed
from qwen3next_plugin.versions import check_host


class CpuPlatform(CpuSRTPlatform):
    """SGLang's CPU."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """For our model: refuse what cannot be served, fill in defaults, and log both.

        SGLang calls this once, in the process that starts the others.
        """
        from sglang.srt.arg_groups.model_override_base import model_config_of

        if not register():
            return
        model_config = model_config_of(server_args)
        if not is_ours(model_config):
            return
        flags.check(server_args, model_config, on_cpu=True)
        defaults = flags.complete_on_cpu(server_args)
        logger.info(
            "qwen3next_plugin %s serves this model on SGLang %s, with %s kernels (%s); "
            "defaults for a machine without a GPU, where no flag was given: %s",
            __version__,
            check_host("sglang"),
            described("cpu"),
            use_cpu(),
            ", ".join(defaults) or "none",
        )

    def post_load_model(self, model: Any) -> None:
        """Called once a model's weights are loaded and packed."""
        progress.finish()
        if is_loaded_last(model):
            keep_freed()
