"""Figures of pages that no benchmark measures are those of the code or of other tests."""

import torch

from benchmarks.headline import span
from benchmarks.render import DOCS
from benchmarks.report import MEASURED, Record
from engines.quality import BOUNDS
from qwen3next_plugin.model.state import PageLayout

README = DOCS.parent / "README.md"
STATE, MODELS = ((DOCS / f"{name}.md").read_text() for name in ("state", "models"))


def test_bytes_of_a_page():
    """At the released model's shapes, as the page says, and of vLLM's num_drafts + 1 states."""
    rows: dict[str, list[str]] = {}
    for num_drafts in range(5):
        layout = PageLayout(16, 32, 128, 128, num_drafts, torch.bfloat16, torch.float32)
        parts = layout.nbytes()
        states = (num_drafts + 1) * (parts["state"] + 2 * (3 + num_drafts) * layout.conv_dim)
        for name, cell in {
            "**one page**": f"**{layout.page_bytes:,}**",
            "a state per draft token and one more, as in vLLM's own model": f"{states:,}",
            "ratio": f"{layout.page_bytes / states:.2f}",
        }.items():
            rows.setdefault(name, []).append(cell)
    for name, cells in rows.items():
        assert f"| {name} | {' | '.join(cells)} |" in STATE


def test_the_readme_says_what_the_claim_came_to():
    record = Record.load(MEASURED / "claim" / "factors.json")
    found = span([float(row["times"]) for row in record.rows.values()])
    assert f"[Qwen's 10× claim](docs/claim.md): {found} times here" in README.read_text()


def test_bounds_of_quantised_weights():
    names = {"int8": "int8 (`QWEN3", "fp8-blocks": "FP8, 128", "int4": "int4 (`QWEN3"}
    assert names.keys() == BOUNDS.keys()
    lines = MODELS.splitlines()
    for kind, (perplexity, accepted) in BOUNDS.items():
        (line,) = (line for line in lines if line.startswith(f"| {names[kind]}"))
        assert line.endswith(f"| {perplexity} | {accepted} |")
