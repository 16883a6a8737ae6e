"""Steps that mix prompts given as embeddings and as token ids."""

from collections.abc import Callable
from typing import Any

import torch

from qwen3next_plugin.engines.sglang.names import is_ours
from qwen3next_plugin.engines.sglang.patches import When, patch


@patch(
    When.ON_CPU,
    "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
    reason="a request of embeddings ends the scheduler if a step reads it beside another",
    remove_when="SGLang embeds the tokens of other requests",
)
def prepare(host: Callable[[Any], None], batch: Any) -> None:
    """Wrap `ScheduleBatch.prepare_for_extend`."""
    host(batch)
    place_embeds(batch)


def place_embeds(batch: Any) -> None:
    """Let each request's embeddings replace only its own tokens'.

    SGLang uses some requests' embeddings for the whole step, and rounds them to bf16.
    """
    if batch.input_embeds is None or not is_ours(batch.model_config):
        return
    positions: list[int] = []
    begin = 0
    for req, before, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        if req.input_embeds is not None:
            given = min(length, len(req.input_embeds) - before)
            positions += range(begin, begin + given)
        begin += length
    embeds = batch.input_embeds
    places = torch.tensor(positions, device=embeds.device)
    if batch.replace_embeds is not None:  # of other requests' single tokens
        embeds = torch.cat((embeds, batch.replace_embeds.to(embeds.dtype)))
        places = torch.cat((places, batch.replace_positions))
    batch.input_embeds = None
    batch.replace_embeds, batch.replace_positions = embeds, places
