"""The folder of a prefix cache: what is refused at start, and what has files of its own."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoints import write_checkpoint
from damage import SLIGHT, slightly_changed
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.fleet import computed_by
from qwen3next_plugin.extras.fleet.sglang.folder_flags import LINKER, MODULE, check_folder, space
from qwen3next_plugin.extras.fleet.sglang.shared_settings import refuse_other_weights


def given(folder: Path | str, **changes: Any) -> SimpleNamespace:
    """What a server is started with; of changes, those in capitals are the linker's."""
    config = {
        "linker": changes.pop("LINKER", LINKER),
        "linker_module_path": changes.pop("MODULE", MODULE),
        "linker_extra_config": {
            "folder": str(folder),
            "folder_bytes": 1 << 30,
        }
        | changes.pop("SETTINGS", {}),
    }
    flags = {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": config,
        "nnodes": 1,
        "enable_lora": None,
        "lora_paths": None,
        "load_format": "auto",
        "schedule_policy": "fcfs",
        "disaggregation_mode": "null",
    }
    return SimpleNamespace(**(flags | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unified_cache_external_linker_backend": "mooncake"}, "only FolderLinker of .*dynamic"),
        ({"unified_cache_external_linker_config": None}, "only FolderLinker of"),
        ({"LINKER": "Other"}, "only FolderLinker of"),
        ({"SETTINGS": {"folder": None}}, "folder = None: no such folder; make it, or change"),
        ({"SETTINGS": {"folder": "/proc"}}, r"folder = '/proc' cannot be written \(.*\): grant"),
        ({"SETTINGS": {"folder_bytes": None}}, "folder_bytes is missing in linker_extra_config"),
        ({"SETTINGS": {"folder_bytes": -1}}, "folder_bytes = -1: must be a number of bytes"),
        ({"SETTINGS": {"folder_gb": 9}}, "FolderLinker has no folder_gb; it has folder, folder_by"),
        ({"nnodes": 2}, "--nnodes 2: .*use one machine"),
        ({"enable_lora": True}, "--enable-lora: .*serve without adapters"),
        ({"lora_paths": {"a": "b"}}, "--enable-lora: .*serve without adapters"),
        ({"load_format": "dummy"}, "--load-format dummy: .*leave it out"),
        ({"schedule_policy": "lpm"}, "--schedule-policy lpm: .*use fcfs"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_folder(given(tmp_path, **changes), on_cpu=True)


def test_a_gpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="copies on CPUs only"):
        check_folder(given(tmp_path), on_cpu=False)


def test_other_weights_are_refused_while_serving(tmp_path):
    with pytest.raises(ConfigError, match="restart the server"):
        refuse_other_weights(given(tmp_path))
    refuse_other_weights(given(tmp_path, enable_unified_cache_external_linker=False))


def test_each_way_to_compute_a_page_has_its_own_files(monkeypatch, checkpoint, tmp_path):
    def named(model: Path = checkpoint, *sizes: Any, eps: float = 1e-6, dtype: str = "float32"):
        args = SimpleNamespace(
            model_path=str(model), revision=None, download_dir=None, attention_backend="own"
        )
        config = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": eps}
        hf_config = SimpleNamespace(to_dict=lambda: config)
        return space(args, SimpleNamespace(hf_config=hf_config, dtype=f"torch.{dtype}"), *sizes)

    found = [
        named(),
        named(checkpoint, 2),
        named(eps=1e-5),
        named(dtype="bfloat16"),
        named(write_checkpoint(tmp_path / "own", seed=5)),
        *(named(slightly_changed(checkpoint, tmp_path / w, w)) for w in SLIGHT),
    ]
    monkeypatch.setenv("QWEN3NEXT_QUANTISE", "int8")
    found.append(named())
    monkeypatch.delenv("QWEN3NEXT_QUANTISE")
    monkeypatch.setattr(computed_by, "instructions", lambda: ["another processor"])
    found.append(named())
    assert len(set(found)) == len(found)
    monkeypatch.undo()
    assert named() == found[0]
