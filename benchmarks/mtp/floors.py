"""The least that a step with MTP can cost, in plain steps, from the bytes it must read.

A step reads each weight once, except the experts: it reads those that its tokens are routed to.
Decoding is bound by these bytes, so their ratio is a lower bound of the times' ratio.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.block_model import CONFIG
from benchmarks.report import Record, Run

BF16, INT8 = 2, 1
DRAFTS = (1, 2, 3)


@dataclass(frozen=True)
class Model:
    """Bytes of a model's parts: weights in bf16, the draft head in int8."""

    linear_layers: int
    attention_layers: int
    experts: int
    active: int
    vocabulary: int
    draft_rows: int

    D = CONFIG["hidden_size"]
    attention = BF16 * D * (CONFIG["num_attention_heads"] * 3 + CONFIG["num_key_value_heads"] * 2)
    attention *= CONFIG["head_dim"]
    key, value = (
        CONFIG[f"linear_num_{part}_heads"] * CONFIG[f"linear_{part}_head_dim"]
        for part in ("key", "value")
    )
    linear = BF16 * D * (2 * key + 3 * value + 2 * CONFIG["linear_num_value_heads"])
    expert = BF16 * 3 * D * CONFIG["moe_intermediate_size"]
    fc = BF16 * 2 * D * D

    @property
    def head(self) -> int:
        return BF16 * self.vocabulary * self.D

    def experts_read(self, tokens: int) -> float:
        """Bytes of one layer's shared expert and of the experts that random tokens choose."""
        return self.expert * (1 + self.experts * (1 - (1 - self.active / self.experts) ** tokens))

    def step(self, tokens: int) -> float:
        """Bytes of an engine step of so many tokens."""
        layers = self.linear_layers + self.attention_layers
        mixers = self.linear_layers * self.linear + self.attention_layers * self.attention
        return mixers + layers * self.experts_read(tokens) + self.head

    def draft(self, batch: int) -> float:
        """Bytes of one pass of the MTP layer and its draft head."""
        head = INT8 * self.draft_rows * self.D
        return self.fc + self.attention + self.experts_read(batch) + head

    def over_plain(self, k: int, batch: int) -> float:
        """A verify step of k drafts a request and the k passes that draft them, in plain steps."""
        return (self.step(batch * (k + 1)) + k * self.draft(batch)) / self.step(batch)


VOCABULARY, DRAFT_ROWS = CONFIG["vocab_size"], 32768
BLOCK = Model(3, 1, CONFIG["num_experts"], CONFIG["num_experts_per_tok"], VOCABULARY, DRAFT_ROWS)
RELEASED = Model(36, 12, 512, 10, VOCABULARY, DRAFT_ROWS)  # Qwen3-Next-80B-A3B


def measure(run: Run) -> Iterator[Record]:
    """The floors, as a record; counted, so the machine does not matter."""
    yield run.record(
        "mtp/floors",
        "What does a verify step with k drafts cost at least?",
        "counted in bytes; weights in bf16, the draft head in int8",
        {f"k = {k}": "plain steps" for k in DRAFTS},
        table(),
    )


def table() -> dict[str, dict[str, float]]:
    """Plain steps that a verify step with k drafts costs at least."""
    models = {"block model": BLOCK, "48 layers": RELEASED}
    return {
        f"{name}, batch {batch}": {f"k = {k}": model.over_plain(k, batch) for k in DRAFTS}
        for name, model in models.items()
        for batch in (1, 8)
    }
