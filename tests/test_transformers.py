"""transformers has what the config reader and the tests use; its sources are read, not imported."""

import ast
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from engines.contract import Sources, arguments, definition, host, in_order, other_hosts
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.versions import TESTED

ROOT = Path(__file__).parents[1]
MODELING = "models/qwen3_next/modeling_qwen3_next.py"
CONFIGURATION = "models/qwen3_next/configuration_qwen3_next.py"
# Where names are defined that `transformers` itself loads lazily.
LAZY = (
    CONFIGURATION,
    MODELING,
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


@pytest.fixture(scope="module", params=["installed", *other_hosts("transformers")])
def sources(request) -> Sources:
    pytest.importorskip("transformers")
    return host("transformers", request.param)


def imported() -> list[tuple[str, str]]:
    """(module, symbol) of every import from transformers, here and in the examples."""
    found = set()
    for folder in ("qwen3next_plugin", "kernels", "mtp", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
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
