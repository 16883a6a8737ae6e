"""Every transformers has what our classes override, as they override it; read, not imported."""

from pathlib import Path

import pytest

from engines.contract import Sources, check_entry, host, other_hosts

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
OTHERS = [str(path.parent) for path in sorted(ROOT.glob(".transformers/*/.installed"))]


@pytest.fixture(scope="module", params=["installed", *OTHERS, *other_hosts("transformers")])
def sources(request) -> Sources:
    return host("transformers", request.param)


def test_what_is_overridden_is_there(sources):
    from qwen3next_plugin.engines.transformers.patches import TABLE

    assert TABLE
    for entry in TABLE:
        check_entry(sources, entry)
