"""Benchmarks report in one format: no figure on a red check, none of a quick run in docs/."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import parts, render, report
from benchmarks.engines.__main__ import Name
from benchmarks.report import Record, RedCheckError, Run

RECORDS = sorted(report.MEASURED.rglob("*.json"))


@pytest.fixture
def run(tmp_path) -> Run:
    return Run("benchmarks.engines", tmp_path, quick=False)


def answer(run: Run) -> Record:
    rows = {"step": {"plugin": 12.345, "baseline": "not measured"}, "other": {"plugin": 1234.5}}
    units = {"plugin": "ms", "baseline": ""}
    return run.record("engines/steps", "How long?", "a model", units, rows)


def test_docs_show_the_records():
    assert render.pages()
    for path, page in render.pages().items():
        assert path.read_text() == page, "run python -m benchmarks.render"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_of_docs_are_full_and_complete(path):
    record = Record.load(path)
    assert path == report.MEASURED / f"{record.name}.json"
    assert not record.quick
    assert record.machine
    assert record.date
    assert record.command.startswith("python -m benchmarks.")
    for row in record.rows.values():
        assert set(row) <= set(record.units)


def test_a_record_survives_its_file(run):
    record = answer(run)
    assert Record.load(record.save(run.records)) == record


def test_a_run_is_printed_and_kept(run, capsys):
    report.finish(run, lambda: [answer(run)])
    printed = capsys.readouterr().out
    assert "How long?" in printed
    assert "| step  | 12.3" in printed
    assert "QUICK" not in printed
    assert json.loads((run.out / "engines/steps.json").read_text())["quick"] is False


def test_a_quick_run_says_so_and_leaves_docs_alone(run, capsys, monkeypatch):
    monkeypatch.setattr(render, "write", lambda: pytest.fail("docs/ written"))
    monkeypatch.setattr(report, "MEASURED", run.out / "measured")
    quick = replace(run, quick=True)
    report.finish(quick, lambda: [answer(quick)], docs=True)
    assert report.QUICK in capsys.readouterr().out
    assert json.loads((run.out / "quick/engines/steps.json").read_text())["quick"] is True
    assert not (run.out / "measured").exists()


def test_a_quick_record_is_not_rendered(run):
    with pytest.raises(ValueError, match="quick"):
        render.markdown([answer(replace(run, quick=True))])


def test_a_full_run_is_published(run, monkeypatch):
    written: list[Path] = []
    monkeypatch.setattr(report, "MEASURED", run.out / "measured")
    monkeypatch.setattr(render, "write", lambda: written.append(run.out))
    report.finish(run, lambda: [answer(run)], docs=True)
    assert (run.out / "measured/engines/steps.json").exists()
    assert written


def test_a_red_check_ends_a_run_without_its_figure(run, capsys, monkeypatch):
    def red() -> Iterator[Record]:
        yield answer(run)
        raise RedCheckError("plugin and upstream differ")
        yield replace(answer(run), name="engines/hosts")

    monkeypatch.setattr(render, "write", lambda: pytest.fail("docs/ written"))
    with pytest.raises(SystemExit) as stopped:
        report.finish(run, red, docs=True)
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.count("How long?") == 1
    assert "red, so there is no figure: plugin and upstream differ" in printed.err
    assert [path.name for path in run.out.rglob("*.json")] == ["steps.json"]


def test_tables_of_one_question_are_joined(run):
    def of(engine: str, value: float, command: str) -> Record:
        rows = {"one client": {engine: value, f"{engine}, rounds": "1.20–1.60"}}
        units = {engine: "", f"{engine}, rounds": ""}
        record = run.record(f"mtp/over_off/{engine}", "How fast?", "a model", units, rows)
        return replace(record, command=command)

    block = render.block([of("vLLM", 1.5, "first"), of("SGLang", 1.25, "second")])
    assert "| How fast? | vLLM | SGLang |" in block
    assert "| one client | 1.50 (1.20–1.60) | 1.25 (1.20–1.60) |" in block
    assert block.index("`first`") < block.index("`second`")


def test_parts_that_a_run_leaves_out_are_named(run, capsys, monkeypatch):
    monkeypatch.setattr(parts, "SGLANG_PYTHON", run.out / "missing")
    both = {
        Name.STEPS: parts.Part(lambda run: iter([answer(run)])),
        Name.STARTUP: parts.Part(lambda run: iter([answer(run)]), in_quick=False),
        Name.HOSTS: parts.Part(lambda run: iter([answer(run)]), needs_sglang=True),
    }
    quick = replace(run, quick=True)
    assert len(list(parts.measure(run, both))) == 2
    assert len(list(parts.measure(quick, both))) == 1
    assert len(list(parts.measure(quick, both, Name.STARTUP))) == 1
    said = capsys.readouterr().err
    assert "hosts: left out, needs `make setup ENGINE=sglang`" in said
    assert "startup: left out of --quick" in said


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (62.0, "62.0"),
        (0.0449, "0.045"),
        (1.7, "1.70"),
        (104.2, "104"),
        (2746.4, "2,746"),
        (8192, "8,192"),
        ("not split", "not split"),
    ],
)
def test_three_digits(cell, expected):
    assert report.text(cell) == expected
