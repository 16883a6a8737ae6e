"""A step's embeddings are in place of the tokens of the requests that brought them."""

from types import SimpleNamespace as Bag

import pytest
import torch

from qwen3next_plugin.extras.host_fixes.sglang.prompts import place_embeds

D = 3


def step(*requests, replaced=(), model="Qwen3NextForCausalLM"):
    """A batch as SGLang prepares it: of each request (embeddings or None, tokens before, length).

    replaced: places of single tokens with embeddings of 0.5, bf16
    """
    parts = [given[before : before + n] for given, before, n in requests if given is not None]
    rows = [row for part in parts for row in part]
    return Bag(
        model_config=Bag(hf_config=Bag(architectures=[model])),
        reqs=[Bag(input_embeds=given) for given, _, _ in requests],
        prefix_lens=[before for _, before, _ in requests],
        extend_lens=[length for _, _, length in requests],
        input_embeds=torch.tensor(rows) if rows else None,
        replace_embeds=torch.full((len(replaced), D), 0.5).bfloat16() if replaced else None,
        replace_positions=torch.tensor(replaced) if replaced else None,
    )


def embedded(batch):
    """What SGLang makes of tokens whose embeddings are 0."""
    rows = torch.zeros(sum(batch.extend_lens), D)
    assert batch.input_embeds is None
    rows[batch.replace_positions] = batch.replace_embeds.to(rows.dtype)
    return rows


@pytest.mark.parametrize("replaced", [[], [1, 6]], ids=str)
def test_embeddings_are_in_place_of_their_requests_tokens(replaced):
    first, second = torch.rand(7, D), torch.rand(2, D)
    batch = step(
        *((None, 0, 2), (first.tolist(), 3, 4), (None, 5, 1), (second.tolist(), 0, 2)),
        replaced=replaced,
    )
    place_embeds(batch)
    wanted = torch.zeros(9, D)
    wanted[2:6], wanted[7:] = first[3:], second
    wanted[replaced] = 0.5
    assert torch.equal(embedded(batch), wanted)


@pytest.mark.parametrize(
    ("request_", "model"),
    [((None, 0, 2), "Qwen3NextForCausalLM"), (([[0.5] * D], 0, 1), "LlamaForCausalLM")],
    ids=["of tokens", "of another model"],
)
def test_a_step_is_left_alone(request_, model):
    batch = step(request_, replaced=[0], model=model)
    before = dict(vars(batch))
    place_embeds(batch)
    assert vars(batch) == before
