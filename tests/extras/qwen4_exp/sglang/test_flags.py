"""SGLang's flags for Qwen4-Exp: what is refused at load, by name, and what is left out."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace as Bag
from unittest import mock

import pytest

from extras.qwen4_exp.model import write_qwen4_exp
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.sglang.config import read_config
from qwen3next_plugin.extras.fleet.sglang import handover_flags

NEXTN = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
FP32 = {"dtype": "float32"}


@pytest.fixture(scope="module")
def environment():
    """SGLang hands some flags on in environment variables: no later test's server may see them.

    NIXL need not be installed: only a server uses it.
    """
    with mock.patch.dict(os.environ), mock.patch.object(handover_flags, "find_spec"):
        yield


@pytest.fixture(scope="module")
def complete(environment):
    """SGLang completes its flags, as it does before it starts a process; what they then are."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    def run(model, **flags):
        server_args = ServerArgs(model_path=str(model), **flags)
        server_args.resolve_once()
        return resolving_view(server_args)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen4_exp(tmp_path_factory.mktemp("streams"), wrapped=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_paths": ["x=adapter"]}, "--lora-paths: .* several streams .*leave it out"),
        ({"attention_backend": "torch_native"}, "--attention-backend torch_native: .*; use qwen3n"),
        ({"decode_attention_backend": "torch_native"}, "--decode-attention-backend torch_native: "),
        (NEXTN | {"speculative_eagle_topk": 2}, "--speculative-eagle-topk 2: .*; use 1"),
        ({"load_format": "dummy"}, "--load-format dummy: the table of n-grams .*; leave it out"),
        ({"kv_cache_dtype": "bf16"}, "--kv-cache-dtype bf16: .*float32; leave it out"),
        ({"qsa_indexer_dtype": "fp8_e4m3"}, "--qsa-indexer-dtype fp8_e4m3: .*; leave it out"),
        (
            {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "nixl"},
            "--disaggregation-mode prefill: .* several streams .*; leave it out",
        ),
    ],
    ids=str,
)
def test_flags_are_refused_for_several_streams(complete, folder, flags, message):
    with pytest.raises(ConfigError, match=message):
        complete(folder, **FP32, **flags)


def test_a_model_with_several_streams_is_served_for_texts(complete, folder, caplog):
    """By its own kernels, pages and pools: SGLang knows nothing of it."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    from qwen3next_plugin.extras.qwen4_exp.sglang.flags import check_streams

    with caplog.at_level("INFO"):
        resolved = complete(folder, **FP32, **NEXTN, language_model_only=True)
    assert (resolved.page_size, resolved.attention_backend) == (1, "qwen3next_cpu")
    assert resolved.uses_mamba_radix_cache
    config = model_config_of(resolved)
    assert not config.is_multimodal
    assert config.hf_config.architectures == ["Qwen4ExpForCausalLM"]
    named = [line for line in caplog.messages if "served for texts" in line]
    assert len(named) == 1
    assert "Qwen4ExpForConditionalGeneration" in named[0]
    sizes = read_config(config.hf_config, 1)
    written = Qwen3NextConfig.from_hf(json.loads((folder / "config.json").read_text()))
    no_dense_layers = {"intermediate_size": 0}
    assert replace(sizes, **no_dense_layers) == replace(written, **no_dense_layers)
    with pytest.raises(ConfigError, match="on CPUs only"):
        check_streams(sizes, resolved, on_cpu=False)
    linker = "enable_unified_cache_external_linker"
    with pytest.raises(ConfigError, match=r"linker: .* several streams .*; leave it out"):
        check_streams(sizes, Bag(enable_lora=False, lora_paths=None, **{linker: True}), on_cpu=True)
