"""The folder of a prefix cache: what is refused at load, and what has files of its own."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import vllm

from checkpoints import write_checkpoint
from damage import SLIGHT, slightly_changed
from engines.hubs import MODEL, downloaded
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.extras.fleet import computed_by
from qwen3next_plugin.extras.fleet.vllm.folder_flags import SPEC, complete_folder
from qwen3next_plugin.extras.fleet.vllm.shared_settings import refuse_other_weights
from qwen3next_plugin.model.checkpoint.fingerprint import fingerprint

MODULE = "qwen3next_plugin.extras.fleet.vllm.folder"
DRAFTS = {"method": "mtp", "num_speculative_tokens": 2}


@pytest.fixture
def complete(checkpoint, tmp_path):
    """vLLM completes its configuration, as it does before it starts a worker."""
    from vllm.engine.arg_utils import EngineArgs

    def run(settings: dict[str, Any] = {}, model: Path = checkpoint, **flags: Any):  # noqa: B006
        own = {"spec_name": SPEC, "spec_module_path": MODULE}
        given = own | {"folder": str(tmp_path), "folder_bytes": 1 << 30} | settings
        transfer = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {k: v for k, v in given.items() if v is not None},
        }
        flags = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | flags
        args = EngineArgs(model=str(model), kv_transfer_config=transfer, **flags)
        return args.create_engine_config()

    return run


def space(config: Any) -> str:
    (tier,) = config.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
    return tier["space"]


def complete_again(config: Any) -> None:
    del config.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
    complete_folder(config, Qwen3NextConfig.from_hf(config.model_config.hf_config))


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (
            {"folder": None},
            {},
            r"folder = None: no such folder; make it, or change .*--kv-transfer",
        ),
        ({"folder": "/nowhere/at/all"}, {}, "folder = '/nowhere/at/all': no such folder"),
        ({"folder": __file__}, {}, "no such folder"),
        ({"folder": "/proc"}, {}, r"folder = '/proc' cannot be written \(.*\): grant user \d+"),
        ({"folder_bytes": None}, {}, "folder_bytes is missing"),
        ({"folder_bytes": "9 GB"}, {}, "folder_bytes = '9 GB': must be a number of bytes"),
        ({"cpu_bytes_to_use": -1}, {}, "cpu_bytes_to_use = -1: must be a number of bytes"),
        ({"folder_gb": 9}, {}, "FolderSpec has no folder_gb; it has .*folder_bytes"),
        ({"secondary_tiers": []}, {}, "FolderSpec has no secondary_tiers"),
        ({}, {"enable_prefix_caching": False}, "leave out --no-enable-prefix-caching"),
        ({}, {"nnodes": 2, "tensor_parallel_size": 2}, "nnodes = 2: .*use one machine"),
        (
            {},
            {"prefix_caching_hash_algo": "xxhash"},
            "prefix_caching_hash_algo = xxhash: .*PYTHONHASHSEED",
        ),
        ({}, {"prefix_caching_hash_algo": "xxhash_cbor"}, "_algo = xxhash_cbor: .*leave out"),
        ({}, {"enable_lora": True}, "enable_lora: .*serve without adapters"),
        ({}, {"load_format": "dummy"}, "load_format = dummy: .*leave out --load-format"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_by_name(monkeypatch, complete, settings, flags, message):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(Exception, match=message):
        complete(settings, **flags)


def test_keys_of_a_seed_that_is_given_can_be_kept(monkeypatch, complete):
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert space(complete(prefix_caching_hash_algo="xxhash"))


def test_a_configuration_is_completed_again(complete):
    """vLLM does so in its engine's process."""
    from qwen3next_plugin.engines.vllm.checking import CheckFlags

    config = complete()
    before = dict(config.kv_transfer_config.kv_connector_extra_config)
    CheckFlags.verify_and_update_config(config)
    assert config.kv_transfer_config.kv_connector_extra_config == before
    known = fingerprint(Path(config.model_config.model), print)
    assert space(config).startswith(f"qwen3next-1-{known}-")


def test_each_way_to_compute_a_page_has_its_own_files(monkeypatch, complete, checkpoint, tmp_path):
    own = write_checkpoint(tmp_path / "own", seed=5)
    found = [
        space(complete()),
        space(complete(dtype="bfloat16")),
        space(complete(speculative_config=DRAFTS)),
        space(complete(speculative_config=DRAFTS | {"num_speculative_tokens": 3})),
        space(complete(tensor_parallel_size=2)),
        space(complete(hf_overrides={"rms_norm_eps": 1e-5})),
        space(complete(prefix_caching_hash_algo="sha256_cbor")),
        space(complete(model=own)),
        *(space(complete(model=slightly_changed(own, tmp_path / w, w))) for w in SLIGHT),
    ]
    with monkeypatch.context() as patch:
        patch.setenv("QWEN3NEXT_QUANTISE", "int8")
        found.append(space(complete(dtype="bfloat16")))
    config = complete()
    for module in (computed_by, torch, vllm):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "99.1")
            complete_again(config)
        found.append(space(config))
    assert len(set(found)) == len(found)
    assert found[0] == space(complete(max_model_len=256, max_num_batched_tokens=300))


def test_a_hubs_weights_are_read_where_the_engine_downloads(
    monkeypatch, complete, checkpoint, tmp_path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = complete()
    before = space(config)
    config.model_config.model = MODEL
    config.load_config.download_dir = downloaded(checkpoint, tmp_path)
    complete_again(config)
    assert space(config) == before


def test_other_weights_are_refused_while_serving(complete, checkpoint):
    config = complete()
    with pytest.raises(ConfigError, match=r"reload_weights: .* restart the server"):
        refuse_other_weights(config)
    config.kv_transfer_config = None
    refuse_other_weights(config)


def test_the_cache_leaves_room_for_prefixes_in_memory(complete, grant_memory):
    """A quarter of what is free, less what the connector takes."""
    grant_memory(6 << 30)
    sizes = [
        complete({"cpu_bytes_to_use": gib << 30}).cache_config.kv_cache_memory_bytes
        for gib in (1, 2)
    ]
    assert sizes[0] - sizes[1] == pytest.approx(1 << 28, rel=0.01)
