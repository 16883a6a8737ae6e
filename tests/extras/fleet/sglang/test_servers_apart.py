"""Prefill and decode on two servers: which flags are served, as SGLang completes them."""

import os
from unittest import mock

import pytest

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.fleet.sglang import handover_flags
from qwen3next_plugin.extras.fleet.sglang.handover_flags import SERVED_APART, check_handover

NIXL = {"disaggregation_transfer_backend": "nixl"}
NEXTN = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
REFUSED = {
    "disaggregation_transfer_backend": "mooncake",
    "disaggregation_decode_host_receive_threshold": 0.5,
    "disaggregation_decode_retraction_backup": "host_pool",
    "dp_size": 2,
    "nnodes": 2,
    "kv_cache_dtype": "bf16",
    "speculative_eagle_topk": 2,
}


@pytest.fixture(scope="module")
def complete():
    """SGLang completes its flags, as it does before it starts a process; what they then are.

    NIXL need not be installed: only a server uses it.
    """
    with mock.patch.dict(os.environ), mock.patch.object(handover_flags, "find_spec"):
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.arg_groups.overrides import resolving_view
        from sglang.srt.server_args import ServerArgs

        def run(model, **flags):
            server_args = ServerArgs(model_path=str(model), **NIXL, **flags)
            server_args.resolve_once()
            return resolving_view(server_args)

        yield run


@pytest.mark.parametrize("flags", [{}, NEXTN], ids=str)
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_what_can_be_served_passes(complete, checkpoint, mode, flags):
    resolved = complete(checkpoint, disaggregation_mode=mode, **flags)
    assert resolved.attention_backend == "qwen3next_cpu"


def test_a_decode_server_has_pages_for_the_requests_that_run(complete, checkpoint):
    flags = {"disaggregation_mode": "decode", "max_running_requests": 4}
    assert complete(checkpoint, **flags).disaggregation_decode_extra_slots == 0
    flags |= {"disaggregation_decode_extra_slots": 3}
    assert complete(checkpoint, **flags).disaggregation_decode_extra_slots == 3


class Given:
    """Resolved flags, one of them with another value."""

    def __init__(self, resolved, name, value):
        self.resolved, self.changed = resolved, {name: value}

    def __getattr__(self, name):
        return self.changed.get(name, getattr(self.resolved, name))


@pytest.mark.parametrize("name", SERVED_APART)
def test_every_flag_of_two_servers_is_refused_by_name(complete, checkpoint, name):
    value = REFUSED.get(name, True)
    written = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") + ": "
    with pytest.raises(ConfigError, match=f"^{written}.*; "):
        check_handover(Given(complete(checkpoint, disaggregation_mode="decode"), name, value))
