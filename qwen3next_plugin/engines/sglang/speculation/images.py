"""Positions of a request's images, which SGLang keeps with the request."""

from sglang.srt.managers.schedule_batch import Req

from qwen3next_plugin.mtp.images import Axes


def axes_of(request: Req) -> Axes | None:
    """Positions of a request with images; None of a text."""
    images = request.multimodal_inputs
    if images is None:
        return None
    return Axes(images.mrope_positions, int(images.mrope_position_delta))
