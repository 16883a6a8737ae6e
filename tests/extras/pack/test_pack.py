"""The command `qwen3next pack`; what it writes is in test_in_panels.py."""

import json
import os
import shutil
from pathlib import Path

from typer.testing import CliRunner

from checkpoints import write_checkpoint
from command_line import run
from qwen3next_plugin.cli import app
from qwen3next_plugin.engines.plan import GIB


def test_pack_and_plan_what_it_wrote(tmp_path):
    plain, out = write_checkpoint(tmp_path / "plain", num_hidden_layers=4), tmp_path / "out"
    refused = run("pack", plain, out)
    assert refused.exit_code == 1
    assert "is not quantised; add --quantise int8 or --quantise int4" in refused.output
    assert "Traceback" not in refused.output
    result = run("pack", plain, out, "--quantise", "int4")
    assert result.exit_code == 0
    assert "QWEN3NEXT_QUANTISE=int4: " in result.stdout
    assert result.stdout.splitlines()[-1] == f"QWEN3NEXT_MMAP=1 vllm serve {out}"
    options = ("--max-model-len", 1024, "--num-speculative-tokens", 2, "--json")
    planned = json.loads(run("plan", out, *options).stdout)
    assert planned["weights_from"].startswith("safetensors files (")
    quantised = CliRunner(env={"QWEN3NEXT_QUANTISE": "int4"}).invoke(
        app, ["plan", str(plain), *map(str, options)]
    )
    expected = json.loads(quantised.stdout)["weights"]
    del expected["draft head"], planned["weights"]["draft head"]
    assert planned["weights"] == expected
    in_files = CliRunner(env={"QWEN3NEXT_MMAP": "1"}).invoke(
        app, ["plan", str(out), *map(str, options), "--memory", "3"]
    )
    mapped = json.loads(in_files.stdout)
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert mapped["flags"]["mapped"] == stored
    beside = 3 * GIB - sum(mapped["weights"].values()) - mapped["scratch"]
    assert mapped["spare"] == beside - stored


def test_a_path_that_is_not_utf_8_is_named(tmp_path):
    """Of either folder."""
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    plain = write_checkpoint(tmp_path / "plain", num_hidden_layers=4)
    shutil.copytree(plain, other)
    for folders in ((other, tmp_path / "out"), (plain, other / "out")):
        result = run("pack", *folders, "--quantise", "int8")
        assert result.exit_code == 1
        assert "the path is not UTF-8" in result.output.replace("\n", "")
        assert "Traceback" not in result.output


def test_pack_explains_itself():
    said = " ".join(run("pack", "--help").stdout.split())
    for word in ("MODEL", "OUT", "--quantise", "QWEN3NEXT_MMAP=1", "sglang serve", "the same bits"):
        assert word in said


def test_pack_where_nothing_can_be_written(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", num_hidden_layers=4)
    (tmp_path / "file").touch()
    result = run("pack", plain, tmp_path / "file" / "out", "--quantise", "int8")
    assert result.exit_code == 1
    assert f"packing into {tmp_path / 'file' / 'out'} failed: " in result.output.replace("\n", "")


def test_a_misspelt_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN3NEXT_QUANTIZE", "int4")
    result = run("pack", tmp_path, tmp_path / "out")
    assert result.exit_code == 1
    assert "did you mean QWEN3NEXT_QUANTISE?" in result.stderr
