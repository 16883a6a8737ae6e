"""Images and videos in chats: a server's answers are transformers'."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from engines.checks import TOLERANCE
from engines.clients import chat
from engines.server import Server
from vision import PLACE, VIDEO_PLACE, VisionReference, as_url, random_image, random_video

TOKENS = 16
QUESTION = " import os"


def _url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _header_only(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


# None can be read.
HOSTILE = {
    "no image": _url(b"no image"),
    "nothing": _url(b""),
    "no base64": "data:image/png;base64,$$$",
    "no scheme": "image",
    "a file": "file:///etc/passwd",
    "nobody listens": "http://127.0.0.1:1/image.png",
    "3,600 million pixels": _url(_header_only(60_000, 60_000)),
    "no pixels": _url(_header_only(64, 64)),
    "one pixel wide": as_url(Image.new("RGB", (1, 5000))),
    "no video": _url(b"no video", "video/mp4"),
}


def check_hostile_images(server: Server, reference: VisionReference) -> None:
    """Each is refused, and an honest image is then answered as before."""
    for name, url in HOSTILE.items():
        kind = "video_url" if name == "no video" else "image_url"
        with pytest.raises(openai.APIStatusError):
            ask_about(server, {"type": kind, kind: {"url": url}})
        check_an_image_in_a_chat(server, reference)


def check_an_image_in_a_chat(server: Server, reference: VisionReference) -> None:
    """One image, as a data URL."""
    image = random_image(160, 64, seed=4)
    part = {"type": "image_url", "image_url": {"url": as_url(image)}}
    _check(server, part, reference.greedy(_as_chat(PLACE), [image], TOKENS))


def check_a_video_in_a_chat(server: Server, reference: VisionReference) -> None:
    """One video of four frames, as a data URL of JPEGs, which vLLM alone takes."""
    frames = [_jpeg(frame) for frame in random_video(4, 96, 64)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(f).decode() for f in frames)
    video = np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])
    part = {"type": "video_url", "video_url": {"url": url}}
    _check(server, part, reference.greedy(_as_chat(VIDEO_PLACE), [], TOKENS, [video]))


def ask_about(server: Server, part: dict[str, Any]) -> Any:
    """The answer to a chat that shows something; with log-probabilities."""
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    return chat(server, messages, TOKENS, logprobs=True, extra_body={"ignore_eos": True}).choices[0]


def _check(
    server: Server, part: dict[str, Any], expected: tuple[tuple[int, ...], torch.Tensor]
) -> None:
    """By probabilities: tokens that are parts of characters have no text of their own."""
    found = [entry.logprob for entry in ask_about(server, part).logprobs.content]
    assert (torch.tensor(found) - expected[1]).abs().max() < TOLERANCE, (found, expected)


def _as_chat(place: str) -> str:
    return f"<|im_start|>user\n{place}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG")
    return buffer.getvalue()
