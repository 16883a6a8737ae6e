"""The claim's benchmark: its models have the released layers, times are scaled, checks are red."""

import re
from contextlib import nullcontext

import pytest
from safetensors.torch import load_file

from benchmarks import claim, claim_models, pictures, render
from benchmarks.claim_models import BLOCK, DENSE, FULL, LINEAR, NEXT
from benchmarks.report import RedCheckError, Run
from benchmarks.worker import PROMPTS, prompts

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
PAGE = (render.DOCS / "claim.md").read_text()


@pytest.fixture
def run(tmp_path) -> Run:
    fields = ("run", "commit", "processor", "cores")
    return Run(tmp_path, "claim", dict.fromkeys(fields, "a"))


@pytest.mark.parametrize("model", [DENSE, NEXT])
def test_models_are_complete_and_what_transformers_loads(run, model):
    one, two = (claim_models.written(run, model, blocks, SMALL) for blocks in (1, 2))
    wanted = claim_models.tensors(model, claim_models.config_of(model, 2, SMALL))
    files = [load_file(file) for file in two.glob("*.safetensors")]
    assert {name: tuple(t.shape) for file in files for name, t in file.items()} == wanted
    links = [file for file in two.glob("*.safetensors") if file.is_symlink()]
    assert {file.name for file in links} == {file.name for file in one.glob("*.safetensors")}
    logprobs = claim.reference(one)
    assert len(logprobs) == sum(PROMPTS) - len(PROMPTS)
    assert max(logprobs) < 0
    assert len(set(logprobs)) > 200  # not those of an even distribution


def test_counted_from_the_configs():
    rows = claim.counted()
    dense, sparse = rows[DENSE], rows[NEXT]
    assert dense["parameters"] == dense["used"] == pytest.approx(32.76, abs=0.01)
    assert sparse["parameters"] == pytest.approx(79.67, abs=0.01)
    assert sparse["used"] == pytest.approx(3.87, abs=0.01)
    assert f"{sparse['used']:.1f} of its {sparse['parameters']:.1f} billion parameters" in PAGE
    assert f"{sparse['share']:.1f} %, or {sparse['share in the layers']:.1f} % of" in PAGE


class Engine:
    """Answers as a worker does: a layer's time grows with its context, linear layers' does not."""

    def __init__(self, model: str, added: float) -> None:
        self.model, self.added, self.layers = model, added, 0

    def logprobs(self) -> list[float]:
        assert self.layers == len(BLOCK[self.model])
        return [-1.0, -2.0]

    def call(self, name: str, **arguments: int):
        return getattr(self, name)(**arguments)

    def use(self, layers: int) -> None:
        self.layers = layers

    def context(self, tokens: int, skipped: int, steps: int, batch: int):
        chunks = tokens // claim.CHUNK
        read = [self.times(i + 1) for i in range(chunks)][skipped:]
        return [read, [self.times(chunks) for _ in range(steps)]]

    def times(self, context: int) -> dict[str, float]:
        of_kind = {FULL: 10.0 * context, LINEAR: 2.0}
        beside = self.added if self.layers > len(BLOCK[self.model]) else 1.0
        return {kind: beside * of_kind[kind] for kind in BLOCK[self.model]} | {"rest": 1.0}


@pytest.fixture
def measured(monkeypatch, run):
    """Measures with engines whose second block takes so many times as long, or other results."""

    def measure(added: float = 1.0, logprob: float = -1.0):
        def start(run, model, folder):
            return nullcontext(Engine(model, added))

        monkeypatch.setattr(claim, "start", start)
        monkeypatch.setattr(claim, "reference", lambda folder: [logprob, -2.0])
        monkeypatch.setattr(claim_models, "available_memory", lambda: 10**12)
        monkeypatch.setattr(claim_models, "written", lambda run, model, blocks, changes: blocks)
        return list(claim.measure(run))

    return measure


def test_layer_times_are_scaled(measured):
    speed, layers = measured()
    assert "512 experts" in speed.case
    dense, sparse = 64 * 10 * 64 + 1, 36 * 2 + 12 * 10 * 64 + 1  # milliseconds, at 131,072
    row = speed.rows["decode, 131,072"]
    assert row[DENSE] == pytest.approx(1e3 / dense)
    assert row["times"] == pytest.approx(dense / sparse)
    row = speed.rows["prefill, 131,072"]  # of which 48 steps are interpolated
    assert row[DENSE] == pytest.approx(1e3 * 131072 / sum(64 * 10 * i + 1 for i in range(1, 65)))
    assert speed.rows["decode, 4,096, batch 8"][DENSE] == pytest.approx(8e3 / (64 * 10 * 2 + 1))
    assert layers.rows[f"{NEXT}: full attention layer"]["decode at 131,072"] == 640


def test_the_page_gets_table_and_picture(measured, tmp_path):
    records = measured()
    marks = "<!-- figures: claim/factor* -->\n<!-- end of figures -->\n"
    page = render.rendered(marks, render.DOCS / "claim.md", records)
    assert "| prefill, 4,096 |" in page
    assert len(page.split()) < 150  # what docs/ has left
    pictures.write(tmp_path, records)
    (picture,) = re.findall(r"\]\((.+)\)", page)
    assert "decode, published" in (tmp_path / picture).read_text()


@pytest.mark.parametrize("logprob", [0.0, float("nan")])
def test_other_results_are_red(measured, logprob):
    with pytest.raises(RedCheckError, match="differ by"):
        measured(logprob=logprob)


@pytest.mark.parametrize("added", [0.5, 1.5])
def test_a_layer_that_takes_another_time_in_two_blocks_is_red(measured, added):
    with pytest.raises(RedCheckError, match="read: full_attention takes"):
        measured(added=added)


class Disturbed(Engine):
    """Two blocks are slow in the first `slow` rounds."""

    def __init__(self, slow: int) -> None:
        super().__init__(DENSE, added=1.5)
        self.slow = slow

    def use(self, layers: int) -> None:
        super().use(layers)
        if layers > len(BLOCK[DENSE]):
            self.added = 1.5 if self.slow else 1.0
            self.slow -= 1


def test_one_undisturbed_round_is_enough():
    found = claim.at_depths(DENSE, Disturbed(claim.MOST_ROUNDS - 1))
    assert found.decoded[0][FULL] == 20


def test_rounds_that_are_all_disturbed_are_red():
    with pytest.raises(RedCheckError, match="read: full_attention takes"):
        claim.at_depths(DENSE, Disturbed(claim.MOST_ROUNDS))


def test_experts_that_memory_has_room_for(monkeypatch):
    for free, experts in ((24e9, 512), (16e9, 256)):
        monkeypatch.setattr(claim_models, "available_memory", lambda free=free: free)
        assert claim_models.experts_with_room() == experts
    monkeypatch.setattr(claim_models, "available_memory", lambda: 4e9)
    with pytest.raises(RedCheckError, match="too few for 64 experts"):
        claim_models.experts_with_room()


def test_prompts_are_the_same_everywhere():
    assert prompts((3,), 100) == [prompts(PROMPTS, 100)[0]]
