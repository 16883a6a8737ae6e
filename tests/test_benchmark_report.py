"""Benchmarks report in one format: no figure on a red check, none of two runs on docs' pages."""

import ast
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import headline, parts, pictures, render, report
from benchmarks import origin as origins
from benchmarks.origin import CHANGED, origin
from benchmarks.report import Record, RedCheckError, Run, load_all
from needs import need

SOURCE = {
    "run": "2026-11-28T12:00:00",
    "commit": "commit 0123456789",
    "plugin": "plugin 0.1.0",
    "engines": "vLLM 0.32.0, SGLang none",
    "torch": "torch 2.13.0",
    "processor": "A processor (family 1)",
    "flags": "avx2",
    "cores": "2 cores",
}
RECORDS = load_all(report.MEASURED)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path, "engines", SOURCE)


def answer(run: Run, name: str = "engines/quantised") -> Record:
    rows = {"step": {"plugin": 12.345, "baseline": "not measured"}, "other": {"plugin": 1234.5}}
    return run.record(name, "How long?", "a model", {"plugin": "ms", "baseline": ""}, rows)


@pytest.fixture
def docs(tmp_path, monkeypatch) -> Path:
    """A folder of pages and one of records."""
    for module in (bench, report, render):
        monkeypatch.setattr(module, "MEASURED", tmp_path / "measured", raising=False)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    marks = "<!-- figures: kernels/* engines/* -->\n<!-- end of figures -->\n"
    (tmp_path / "README.md").write_text("<!-- headline -->\n<!-- end of headline -->\n")
    (tmp_path / "docs" / "page.md").write_text(marks)
    return tmp_path / "docs"


def test_docs_show_the_records():
    pages = render.pages(RECORDS)
    assert {path.name for path in pages} >= {"README.md", "performance.md", "mtp.md", "claim.md"}
    for path, page in pages.items():
        assert path.read_text() == page, "run python -m benchmarks.render"


def test_records_of_docs_are_of_one_run():
    render.check(RECORDS)


def test_records_of_docs_are_complete_and_shown():
    pages = "".join(render.pages(RECORDS).values())
    for record in RECORDS:
        assert (report.MEASURED / f"{record.name}.json").exists()
        assert record.origin.keys() == SOURCE.keys()
        assert all(record.origin.values())
        assert record.date
        assert record.part in {*parts.PARTS, *report.OWN_RUNS}
        assert record.seconds > 0
        assert f"| {record.question} |" in pages
        for row in record.rows.values():
            assert set(row) <= set(record.units)


def test_the_origin_says_what_was_measured():
    found = origin("now")
    assert found.keys() == SOURCE.keys()
    assert "unknown" not in found["commit"] or not (render.ROOT / ".git").exists()
    assert "none" not in found["plugin"]
    assert not found["torch"].startswith("torch none")


@pytest.mark.parametrize("field", SOURCE)
def test_records_of_two_runs_are_not_rendered(run, docs, field):
    other = replace(run, origin=SOURCE | {field: "another"})
    with pytest.raises(render.MixedRunsError, match=field):
        render.pages([answer(run), answer(other, "engines/memory")])


def test_the_full_size_has_a_run_of_its_own(run, docs):
    (docs / "page.md").write_text("<!-- figures: full/* -->\n<!-- end of figures -->\n")
    other = replace(run, origin=SOURCE | {"run": "another"}, part=report.FULL)
    full = answer(other, "full/steps")
    page = render.pages([answer(run), full])[docs / "page.md"]
    assert "`python -m benchmarks.full`" in page
    with pytest.raises(render.MixedRunsError, match="run"):
        render.pages([full, answer(replace(other, origin=SOURCE), "full/start")])


def test_records_of_a_changed_tree_are_not_rendered(run, docs):
    changed = replace(run, origin=SOURCE | {"commit": SOURCE["commit"] + CHANGED})
    with pytest.raises(render.MixedRunsError, match="changes"):
        render.pages([answer(changed)])


def test_a_record_survives_its_file(run, tmp_path):
    record = answer(run)
    assert Record.load(record.save(tmp_path)) == record


@pytest.fixture
def measuring(monkeypatch):
    """The parts of a run, made of functions, each measured in this process."""

    def use(**measures):
        made = {name: parts.Part(name, "", 1.0) for name in measures}
        monkeypatch.setattr(bench, "PARTS", made)
        monkeypatch.setattr(bench, "expected", lambda: dict.fromkeys(made, 1.0))
        monkeypatch.setattr(parts.Part, "measure", lambda self, run: measures[self.module](run))

        def child(command: list[str]) -> subprocess.CompletedProcess:
            asked = dict(zip(command[3::2], command[4::2], strict=True))
            out, source = Path(asked["--out"]), json.loads(asked["--origin"])
            try:
                bench.measure(asked["--part"], out, source, out / "run")
            except SystemExit:
                return subprocess.CompletedProcess(command, 1)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(bench.subprocess, "run", child)
        monkeypatch.setattr(bench, "origin", lambda started: SOURCE)

    return use


def red(run: Run) -> Iterator[Record]:
    yield answer(run, "engines/memory")
    raise RedCheckError("plugin and upstream differ")


def test_a_whole_run_writes_docs(docs, tmp_path, measuring, capsys):
    before = Run(tmp_path, "old", SOURCE | {"run": "before"})
    answer(before, "mtp/steps").save(tmp_path / "measured")
    apart = answer(replace(before, part=report.FULL), "full/steps")
    apart.save(tmp_path / "measured")
    measuring(steps=lambda run: iter([answer(run)]))
    bench.main(out=tmp_path / "out")
    assert "| How long? | plugin, ms | baseline |\n" in (docs / "page.md").read_text()
    record, full = load_all(tmp_path / "measured")  # nothing else is left of the run before
    assert full == apart
    assert (record.part, record.origin) == ("steps", SOURCE)
    assert record.seconds > 0
    printed = capsys.readouterr()
    assert "| step  | 12.3" in printed.out
    assert "1 parts, 1 minutes in all" in printed.err


def test_a_red_check_ends_without_its_figures(docs, tmp_path, measuring, capsys):
    before = (docs / "page.md").read_text()
    measuring(good=lambda run: iter([answer(run)]), bad=red)
    with pytest.raises(SystemExit, match="not measured: bad"):
        bench.main(out=tmp_path / "out")
    assert "red, so there is no figure: plugin and upstream differ" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["quantised.json"]
    assert (docs / "page.md").read_text() == before
    assert not (tmp_path / "measured").exists()


def test_an_interrupted_run_goes_on(docs, tmp_path, measuring, capsys, monkeypatch):
    measuring(good=lambda run: iter([answer(run)]), bad=red)
    with pytest.raises(SystemExit):
        bench.main(out=tmp_path / "out")
    measuring(good=red, bad=lambda run: iter([answer(run, "engines/memory")]))
    bench.main(out=tmp_path / "out", resume=True)
    assert {record.part for record in load_all(tmp_path / "measured")} == {"good", "bad"}
    monkeypatch.setattr(bench, "origin", lambda started: SOURCE | {"torch": "torch other"})
    with pytest.raises(SystemExit, match="another product"):
        bench.main(out=tmp_path / "out", resume=True)


def test_a_mended_benchmark_measures_the_same_product(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "ROOT", tmp_path)

    def committed(file: str) -> str:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file)
        origins.git("add", ".")
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        origins.git(*who, "commit", "--no-verify", "-m", file)
        return f"commit {origins.commit()}"

    origins.git("init")
    one, two, three = map(committed, ("kernels/a", "benchmarks/a", "kernels/b"))
    assert len({one, two, three}) == 3
    assert origins.same_product(one, two)
    assert not origins.same_product(two, three)
    assert not origins.same_product(one, "commit other")


def test_a_changed_tree_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "origin", lambda started: SOURCE | {"commit": f"a{CHANGED}"})
    with pytest.raises(SystemExit, match="commit them"):
        bench.main(out=tmp_path)


def test_a_part_alone_leaves_docs(docs, tmp_path, measuring):
    measuring(steps=lambda run: iter([answer(run)]))
    bench.main(part="steps", out=tmp_path / "out")
    assert (tmp_path / "out/parts/engines/quantised.json").exists()
    assert not (tmp_path / "measured").exists()


def test_what_a_machine_lacks_is_named(docs, tmp_path, measuring, monkeypatch, capsys):
    measuring(steps=lambda run: iter([answer(run)]))
    lacking = parts.Part("peers", "", 1.0, missing=lambda: "needs a compiler")
    monkeypatch.setattr(bench, "PARTS", bench.PARTS | {"peers": lacking})
    bench.main(out=tmp_path / "out")
    assert "peers: left out, needs a compiler" in capsys.readouterr().err
    for name, part in parts.PARTS.items():
        assert not part.missing() or name.startswith(("clients-sglang", "peers"))


@pytest.mark.long
@pytest.mark.slow
def test_a_run_from_end_to_end(docs, tmp_path, monkeypatch):
    """The quickest part, really measured, in a process of its own."""
    need("vllm")
    monkeypatch.setattr(bench, "PARTS", {"convolution": parts.PARTS["convolution"]})
    monkeypatch.setattr(bench, "origin", lambda started: origin(started) | {"commit": "commit a"})
    bench.main(out=tmp_path / "out")
    page = (docs / "page.md").read_text()
    assert "| verify 3 drafts, batch 8 |" in page
    assert origin("")["processor"] in page


def test_pages_without_records_say_so(docs):
    render.write()
    assert render.NOT_MEASURED in (docs / "page.md").read_text()
    assert render.NOT_MEASURED in (docs.parent / "README.md").read_text()


def test_the_headline_has_the_worst_row_of_any_table(run, docs):
    def speeds(name: str, rows: dict[str, float]) -> Record:
        units = {"upstream / plugin": ""}
        cells = {row: {"upstream / plugin": ratio} for row, ratio in rows.items()}
        return run.record(name, name, "a model", units, cells)

    memory = {"resident memory": {"plugin / upstream": 0.75}}
    records = [
        speeds("engines/steps", {"decode, batch 1": 1.5, "prompt of 1,024 tokens": 2.0}),
        speeds("engines/family", {"A: decode, batch 8": 0.9, "A: prompt of 1,024 tokens": 1.2}),
        run.record("engines/memory", "m", "a model", {"plugin / upstream": ""}, memory),
    ]
    said = headline.of(records)
    assert "decode steps 0.900 to 1.50 times as fast and prompts 1.20 to 2.00 times" in said
    assert "0.750 of the peak memory. *commit 0123456789; plugin 0.1.0; vLLM 0.32.0" in said
    assert "; A processor (family 1); avx2; 2 cores; " in said
    page = "<!-- headline -->\n<!-- end of headline -->\n"
    assert said in render.rendered(page, docs / "page.md", records)
    shorter = said.replace(f"*{records[0].source}*", f"*{records[0].place}*")
    assert f"](docs/performance.svg)\n\n{shorter}" in render.rendered(page, docs.parent, records)
    assert headline.of([*records, *full_size(run)]).endswith(f"*\n\n{said}")
    pictures.write(docs, records)
    assert (docs / "performance.svg").exists()
    pictures.write(docs, records[1:])
    assert not (docs / "performance.svg").exists()
    assert not headline.of(records[:1])


def full_size(run: Run) -> list[Record]:
    """Of one released size, and another engine's."""
    steps = {"decode, batch 1": {"tokens a second": 12.5}}
    peers = {n: {"other / plugin": x} for n, x in (("decode, batch 1", 1.8), ("prompt", 2.5))}
    tables = {
        "start": {"as released": {"until ready": 99.0}, "packed, mapped": {"until ready": 17.0}},
        "steps": steps,
        "peers": peers,
    }
    units = {"plugin": "ms", "other": "ms", "other / plugin": ""}
    return [run.record(f"full/{n}", n, "a size, how", units, rows) for n, rows in tables.items()]


@pytest.mark.parametrize(
    ("flags", "amx"),
    [("avx2", "without AMX"), ("avx2 amx_bf16", "with AMX, llama.cpp without it")],
)
def test_the_headline_begins_with_the_full_size(run, flags, amx):
    """As released, whatever is faster; and with the worst row of another engine's table."""
    run = replace(run, origin=run.origin | {"flags": flags})
    said = headline.full_size({record.name: record for record in full_size(run)})
    assert said.startswith(
        f"a size, {amx}: ready in 99.0 s (eager), 12.5 tokens a second for one request "
        "(compiled), 1.80 to 2.50 times as fast as other. Packed and mapped: ready in 17.0 s. "
        "*A processor (family 1), "
    )


def test_no_headline_takes_a_row_for_its_value():
    """The least and the greatest are said together (`span`), and only of all rows of a name."""
    tree = ast.parse(Path(headline.__file__).read_text())
    found = {
        function.name
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"min", "max", "sorted"}
    }
    assert found == {"span"}


def test_tables_of_one_question_are_joined(run):
    def of(engine: str, value: float, part: str) -> Record:
        rows = {"one client": {engine: value, f"{engine}, rounds": "1.20–1.60"}}
        units = {engine: "", f"{engine}, rounds": ""}
        alone = replace(run, part=part)
        return alone.record(f"mtp/over_off/{engine}", "How fast?", "a model", units, rows)

    block = render.block([of("vLLM", 1.5, "first"), of("SGLang", 1.25, "second")])
    assert "| How fast? | vLLM | SGLang |" in block
    assert "| one client | 1.50 (1.20–1.60) | 1.25 (1.20–1.60) |" in block
    assert block.index("`--part first`") < block.index("`--part second`")


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
