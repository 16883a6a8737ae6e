"""Every transformers has what the config reader and the tests use, and computes the same.

Its sources are read, not imported, but for the tests marked `long`.
"""

import ast
import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import qwen3next_plugin
import reference_report
from checkpoints import SHAPES, write_checkpoint
from engines.contract import Sources, arguments, definition, host, in_order, other_hosts
from family import FAMILY
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.mtp import policy
from qwen3next_plugin.versions import TESTED

ROOT = Path(__file__).parents[1]
OTHERS = [path.parent for path in sorted(ROOT.glob(".transformers/*/.installed"))]
MODELING = "models/qwen3_next/modeling_qwen3_next.py"
CONFIGURATION = "models/qwen3_next/configuration_qwen3_next.py"
# Where names are defined that `transformers` itself loads lazily.
LAZY = (
    CONFIGURATION,
    MODELING,
    "generation/stopping_criteria.py",
    *(f"models/auto/{kind}_auto.py" for kind in ("modeling", "processing", "tokenization")),
)
# What tests call, with the arguments that they pass.
CALLED = {
    "Qwen3NextRMSNorm": {"__init__": ["self", "dim", "eps"]},
    "Qwen3NextRMSNormGated": {
        "__init__": ["self", "hidden_size", "eps"],
        "forward": ["self", "hidden_states", "gate"],
    },
    "Qwen3NextRotaryEmbedding": {
        "__init__": ["self", "config"],
        "forward": ["self", "x", "position_ids"],
    },
    "Qwen3NextAttention": {
        "__init__": ["self", "config", "layer_idx"],
        "forward": ["self", "hidden_states", "position_embeddings", "attention_mask"],
    },
    "Qwen3NextGatedDeltaNet": {
        "__init__": ["self", "config", "layer_idx"],
        "forward": ["self", "hidden_states"],
    },
    "Qwen3NextSparseMoeBlock": {
        "__init__": ["self", "config"],
        "forward": ["self", "hidden_states"],
    },
    "Qwen3NextDecoderLayer": {
        "__init__": ["self", "config", "layer_idx"],
        "forward": ["self", "hidden_states", "position_embeddings", "attention_mask"],
    },
    "Qwen3NextForCausalLM": {"__init__": ["self", "config"]},
}


@pytest.fixture(
    scope="module", params=["installed", *map(str, OTHERS), *other_hosts("transformers")]
)
def sources(request) -> Sources:
    return host("transformers", request.param)


def imported() -> list[tuple[str, str]]:
    """(module, symbol) of every import from transformers, here and in the examples."""
    found = set()
    ours = (Path(module.__file__).parent for module in (qwen3next_plugin, dispatch, policy))
    for folder in {*ours, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"}:
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                module = getattr(node, "module", None) or ""
                if isinstance(node, ast.ImportFrom) and module.split(".")[0] == "transformers":
                    found |= {(module, alias.name) for alias in node.names}
    return sorted(found)


def test_its_version_is_in_the_tested_range(sources):
    assert TESTED["transformers"].contains(sources.version)


@pytest.mark.parametrize(("module", "symbol"), imported(), ids=lambda part: part)
def test_imported_symbol_is_there(sources, module, symbol):
    if module == "transformers":
        assert any(symbol in sources.names(file) for file in LAZY)
    else:
        sources.check_import(module, symbol)


@pytest.mark.parametrize("name", CALLED)
def test_what_tests_call_takes_what_they_pass(sources, name):
    owner = definition(sources.tree(MODELING), name)
    for method, wanted in CALLED[name].items():
        found = arguments(definition(owner, method))
        assert in_order(wanted, found), f"{name}.{method}{found} lacks {wanted}"


def test_its_config_has_every_field_that_ours_requires(sources):
    owner = definition(sources.tree(CONFIGURATION), "Qwen3NextConfig")
    theirs = {node.target.id for node in owner.body if isinstance(node, ast.AnnAssign)}
    assert {f.name for f in fields(Qwen3NextConfig) if f.default is MISSING} <= theirs


@pytest.mark.long
def test_other_transformers_are_there():
    assert OTHERS, "make test-long installs them"


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> tuple[list[str], dict[str, dict]]:
    """Checkpoints of every kind, and what the installed transformers makes of them."""
    folder = tmp_path_factory.mktemp("kinds")
    paths = [write_checkpoint(folder / name, **changes) for name, changes in SHAPES.items()]
    paths += [member.write(folder / name) for name, member in FAMILY.items()]
    names = list(map(str, paths))
    return names, reference_report.report(names)


@pytest.mark.long
@pytest.mark.parametrize("version", OTHERS, ids=lambda path: path.name)
def test_another_transformers_computes_the_same(version, reports):
    """Configs as we read them, log-probabilities, greedy text and accepted drafts."""
    names, installed = reports
    environment = os.environ | {"PYTHONPATH": str(version)}
    command = [sys.executable, reference_report.__file__, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    other = json.loads(done.stdout.splitlines()[-1])
    assert other.pop("version") == version.name != installed["version"]
    for name, said in other.items():
        here = installed[name]
        assert said.pop("logprobs") == pytest.approx(here["logprobs"], abs=1e-4)
        assert said == {key: here[key] for key in said}
