"""The queries of the Grafana dashboard, and what they ask for of a server's metrics."""

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "qwen3next.json"
SELECTOR = re.compile(r"\b(vllm|sglang):(\w+)\{(.*?)\}")
MATCHER = re.compile(r'(\w+)=~?"(.*?)"')
GROUPED = re.compile(r"\b(?:by|ignoring) \((\w+)\)")


def queries() -> dict[str, list[str]]:
    """The queries of each panel."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels}


def check_dashboard(engine: str, page: str) -> None:
    """Every name and label that the dashboard asks of this engine is on its page of metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    labels: dict[str, dict[str, set[str]]] = {}  # sample → label → values
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(sample.name, {}).setdefault(label, set()).add(value)
    for title, exprs in queries().items():
        mine = [expr for expr in exprs if SELECTOR.search(expr)[1] == engine]
        assert mine, f"{title}: no query of {engine}"
        for expr in mine:
            for prefix, name, matchers in SELECTOR.findall(expr):
                assert prefix == engine, expr
                found = labels.get(f"{engine}:{name}")
                assert found, f"{title}: no {engine}:{name}"
                for label, value in MATCHER.findall(matchers):
                    values = set() if value == "$model" else set(value.split("|"))
                    assert values <= found.get(label, set()), f"{title}: {name} {label} {value}"
                    assert label in found, f"{title}: {name} has no {label}"
                assert set(GROUPED.findall(expr)) <= set().union(
                    *(labels[f"{engine}:{other}"] for _, other, _ in SELECTOR.findall(expr))
                ), expr
