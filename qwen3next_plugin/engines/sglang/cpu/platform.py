"""The platform that SGLang runs on where there is no GPU: its own CPU, with defaults that serve."""

from typing import Any

from sglang.srt.platforms.cpu import CpuSRTPlatform

from qwen3next_plugin import __version__
from qwen3next_plugin.engines.sglang.cpu import memory
from qwen3next_plugin.engines.sglang.cpu.environment import use_cpu
from qwen3next_plugin.engines.sglang.flags import check_cpu_flags, flag
from qwen3next_plugin.engines.sglang.flags_common import check
from qwen3next_plugin.engines.sglang.names import ATTENTION_BACKEND, is_ours, logger
from qwen3next_plugin.engines.sglang.plugin import register
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.versions import check_host

# Flag → what it is when it was not given, and what it is then.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "attention_backend": (None, ATTENTION_BACKEND),
    "mamba_radix_cache_strategy": ("auto", "no_buffer"),
    "disable_overlap_schedule": (False, True),
    "sleep_on_idle": (False, True),  # an idle server would keep a core busy asking for work
    "max_running_requests": (None, 48),  # SGLang's own with drafts; without, it takes 2048
}


class CpuPlatform(CpuSRTPlatform):
    """SGLang's CPU."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Refuse what cannot be served, fill in what was not asked for, and say so.

        Only where our model serves: SGLang calls this once, in the process that starts the others.
        """
        from sglang.srt.arg_groups.model_override_base import model_config_of

        if not register():
            return
        model_config = model_config_of(server_args)
        if not is_ours(model_config):
            return
        given = server_args._raw_input  # SGLang's own choices for a CPU are in place already
        check(server_args, model_config, on_cpu=True)
        check_cpu_flags(server_args, given, model_config)
        chosen = {name: value for name, (unset, value) in DEFAULTS.items() if given[name] == unset}
        for name, value in chosen.items():
            setattr(server_args, name, value)
        defaults = [flag(name, value) for name, value in chosen.items()]
        if all(given[name] is None for name in memory.GIVEN):
            defaults.append(memory.IN_WORDS)
        _say(defaults)


def _say(defaults: list[str]) -> None:
    logger.info(
        "qwen3next_plugin %s serves this model on SGLang %s, with %s kernels (%s); "
        "defaults for a machine without a GPU, where no flag was given: %s",
        __version__,
        check_host("sglang"),
        described("cpu"),
        use_cpu(),
        ", ".join(defaults) or "none",
    )
