"""The script that writes a small Qwen4-Exp checkpoint, as its README says."""

import sys
from pathlib import Path

import pytest

from patience import run
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model.checkpoint.reading import check_stored

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_writes_a_whole_checkpoint(tmp_path, wrapped):
    more = ["--wrapped"] if wrapped else []
    command = [sys.executable, "examples/qwen4_exp_tiny.py", str(tmp_path / "out"), *more]
    done = run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    raw = read_config(tmp_path / "out")
    config = Qwen3NextConfig.from_hf(raw)
    kind = "ForConditionalGeneration" if wrapped else "ForCausalLM"
    assert raw["architectures"] == [f"Qwen4Exp{kind}"]
    assert config.vocab_size > 512
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    check_stored(tmp_path / "out", config, quantised=False, formats=None, with_mtp=True)
