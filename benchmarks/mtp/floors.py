"""What a step with MTP must read, in bytes of a plain step: at least, and as expected.

A step reads each weight once, except the experts: it reads those that its tokens choose. The first
tokens of a verify step's rows are those of the plain step, so it reads no expert less; if all its
tokens choose the same ones, none more. That is the least. Expected: each token chooses at random.
The MTP layer is in int8, but for `mtp.fc` and the router, as on a CPU; so is the draft head.

Times are nearer to each other than bytes where a step does more than read.
"""

from dataclasses import dataclass

from benchmarks.block_model import CONFIG

BF16, INT8 = 2, 1


@dataclass(frozen=True)
class Model:
    """A model's parts: parameters, and bytes of what steps read."""

    linear_layers: int
    attention_layers: int
    experts: int
    active: int
    vocabulary: int
    draft_rows: int

    D = CONFIG["hidden_size"]
    attention = D * (CONFIG["num_attention_heads"] * 3 + CONFIG["num_key_value_heads"] * 2)
    attention *= CONFIG["head_dim"]
    key, value = (
        CONFIG[f"linear_num_{part}_heads"] * CONFIG[f"linear_{part}_head_dim"]
        for part in ("key", "value")
    )
    linear = D * (2 * key + 3 * value + 2 * CONFIG["linear_num_value_heads"])
    expert = 3 * D * CONFIG["moe_intermediate_size"]
    fc = 2 * D * D

    @property
    def head(self) -> int:
        return BF16 * self.vocabulary * self.D

    @property
    def router(self) -> int:
        return BF16 * self.experts * self.D

    def chosen(self, tokens: int) -> float:
        """Experts of a layer that so many tokens choose at random."""
        return self.experts * (1 - (1 - self.active / self.experts) ** tokens)

    def step(self, tokens: int) -> float:
        """Bytes of an engine step whose tokens choose experts at random."""
        return self.reading(self.chosen(tokens))

    def reading(self, experts: float) -> float:
        """Bytes of an engine step that reads so many routed experts a layer, and the shared one."""
        layers = self.linear_layers + self.attention_layers
        mixers = self.linear_layers * self.linear + self.attention_layers * self.attention
        return (
            BF16 * (mixers + layers * self.expert * (1 + experts))
            + layers * self.router
            + self.head
        )

    def draft(self, experts: float) -> float:
        """Bytes of one pass of the MTP layer and its draft head."""
        layer = self.attention + self.expert * (1 + experts) + self.draft_rows * self.D
        return INT8 * layer + BF16 * self.fc + self.router

    def over_plain(self, num_drafts: int, batch: int) -> float:
        """A verify step and the passes that draft for it, at least.

        A plain step reads the more the less its requests share experts; the least ratio is that to
        the most that it can read.
        """
        plain = self.reading(min(self.experts, batch * self.active))
        return 1 + num_drafts * self.draft(self.active) / plain

    def expected(self, num_drafts: int, batch: int) -> float:
        """The same if every token chooses its experts at random."""
        drafts = num_drafts * self.draft(self.chosen(batch))
        return (self.step(batch * (num_drafts + 1)) + drafts) / self.step(batch)


VOCABULARY, DRAFT_ROWS = CONFIG["vocab_size"], 32768
BLOCK = Model(3, 1, CONFIG["num_experts"], CONFIG["num_experts_per_tok"], VOCABULARY, DRAFT_ROWS)
