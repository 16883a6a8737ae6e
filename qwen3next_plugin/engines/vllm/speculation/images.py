"""Positions of a request's images, which vLLM's runner keeps with the request."""

from vllm.v1.worker.gpu_input_batch import CachedRequestState

from qwen3next_plugin.mtp.images import Axes


def axes_of(request: CachedRequestState) -> Axes | None:
    """Positions of a request with images; None of a text."""
    if not request.mm_features:
        return None
    return Axes(request.mrope_positions, request.mrope_position_delta)
