"""The memory for state pages and KV on a machine that also runs other programs."""

from collections.abc import Callable, Mapping
from typing import Any

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.memory import (
    REST,
    SHARE,
    default_pools,
    free_bytes,
    mapped_bytes,
    room,
    share_of,
)
from qwen3next_plugin.engines.plan import GIB, Flags, make_plan
from qwen3next_plugin.engines.sglang.names import OVERRIDE_FLAG, is_ours
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.engines.sglang.pools import Pools

GIVEN = ("mem_fraction_static", "max_total_tokens", "max_mamba_cache_size")
IN_WORDS = (
    f"for states and KV 1/{SHARE} of the memory that is free, at least a request of the context's "
    "length (--mem-fraction-static for more)"
)


def check_memory(sizes: Mapping[str, int], server_args: Any, model_config: Any) -> None:
    """Refuse a model next to whose weights no request fits, unless flags say how much to use.

    Raises:
        ConfigError: what is free, what weights take, and the fix.
    """
    if given(server_args):
        return
    planned = plan(sizes, server_args, model_config).with_default_pools()
    if planned.slots < planned.slots_per_request or not planned.tokens:
        raise ConfigError(planned.refusal("--mem-fraction-static"))


def plan(sizes: Mapping[str, int], server_args: Any, model_config: Any) -> Pools:
    """What one rank takes, and what is free for it, before weights load."""
    config = Qwen3NextConfig.from_hf(
        model_config.hf_config, tp_size=server_args.tp_size, override_flag=OVERRIDE_FLAG
    )
    drafts = server_args.speculative_algorithm is not None
    mapped = mapped_bytes(server_args.model_path, server_args.revision, server_args.download_dir)
    flags = Flags(
        max_model_len=model_config.context_len,
        max_num_seqs=server_args.max_running_requests or 1,
        num_speculative_tokens=(server_args.speculative_num_steps or 0) if drafts else 0,
        dtype=str(model_config.dtype).removeprefix("torch."),
        state_dtype=server_args.mamba_ssm_dtype or "float32",
        prefix_caching=not server_args.disable_radix_cache,
        **share_of(local_ranks(server_args), mapped),
    )
    return make_plan(Pools, config, sizes, flags)


def local_ranks(server_args: Any) -> int:
    """Ranks of all engines on this machine."""
    return max(1, server_args.dp_size * server_args.tp_size // server_args.nnodes)


@patch(
    When.ON_CPU,
    "sglang.srt.utils.common.get_free_cpu_memory",
    reason="SGLang knows the topmost cgroup's limit alone, and counts files in memory as used",
    remove_when="SGLang reads /proc/self/cgroup, and leaves out what memory.stat has of files",
    upstream="https://github.com/sgl-project/sglang/pull/40066",
)
def free_memory(host: Callable[[], int]) -> int:
    """Around `get_free_cpu_memory`: what this process's cgroups leave."""
    return free_bytes()


@patch(
    When.ON_CPU,
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._handle_max_mamba_cache",
    reason="SGLang's pools take nearly all memory that is free",
    remove_when="SGLang asks a platform how much memory to use",
)
def modest_pools(host: Callable[..., float], configurator: Any, total_rest_memory: float) -> float:
    """Around `_handle_max_mamba_cache`: use part of the free memory, unless flags say how much.

    With large weights the default of --mem-fraction-static would leave nothing: it reserves memory
    for the activations of a GPU's steps.

    Returns GiB for KV, in addition to the state pages that SGLang sets aside.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule, get_server_args

    if not is_ours(configurator.model_config):
        return host(configurator, total_rest_memory)
    args = get_server_args()
    if given(args):
        return host(configurator, total_rest_memory - _branches(configurator, total_rest_memory))
    planned = plan({}, args, configurator.model_config)
    most = room(int(free_gib(configurator) * GIB) - REST, planned.flags.mapped)
    budget = default_pools(most, planned.request_bytes) / GIB
    branches = _branches(configurator, budget)
    if not get_memory().disable_radix_cache or not get_schedule().max_running_requests:
        return host(configurator, budget - branches)
    # One page per request, even if more would fit; KV gets the rest of the budget.
    return min(budget, host(configurator, most / GIB - branches))


def free_gib(configurator: Any) -> float:
    """Free memory for one rank of this machine; the minimum over all ranks, as SGLang counts."""
    from sglang.srt.runtime_context import get_parallel, get_server_args
    from sglang.srt.utils import get_available_gpu_memory, get_cpu_ids_by_node

    parallel = get_parallel()
    of_node = get_available_gpu_memory(
        configurator.device,
        configurator.gpu_id,
        distributed=parallel.launch_world_size > 1,
        cpu_group=parallel.world_group.cpu_group,
    )
    nodes, ranks = len(get_cpu_ids_by_node()), local_ranks(get_server_args())
    return of_node * min(1.0, nodes / ranks)


def _branches(configurator: Any, budget: float) -> float:
    """GiB of the pages for branches of draft trees, which SGLang does not count.

    Raises:
        ConfigError: they would take more than half of the budget.
    """
    from sglang.srt.runtime_context import get_schedule, get_spec

    from qwen3next_plugin.engines.sglang.state.pages import max_branches

    if not (branches := max_branches(get_spec().speculative_eagle_topk)):
        return 0.0
    requests = get_schedule().max_running_requests
    page = configurator.mambaish_config.mamba2_cache_params.mamba_cache_per_req / GIB
    if (taken := requests * branches * page) > budget / 2:
        raise ConfigError(
            f"--max-running-requests {requests}: the draft trees of so many requests branch on "
            f"{taken:.2f} GiB of state pages, of {budget:.2f} GiB for states and KV; use fewer "
            f"({int(budget / 2 / branches / page)} fit), a smaller --speculative-num-draft-tokens, "
            f"--speculative-eagle-topk 1, or a larger --mem-fraction-static"
        )
    return taken


def given(flags: Any) -> bool:
    """Whether the command line says how much memory to use."""
    return any(getattr(flags, name) is not None for name in GIVEN)
