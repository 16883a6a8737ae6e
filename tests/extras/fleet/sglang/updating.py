"""A server whose weights change: from a folder, or by tensors that are sent to it."""

import base64
import json
import pickle
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engines.sglang.server import FIXED, NEXTN, Answer, Forked, Server
from extras.fleet.other_weights import PROMPTS

LOGPROBS: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}
UPDATE = "/update_weights_from_tensor"
Named = Sequence[tuple[str, torch.Tensor]]


def start(folder: Path, dtype: str = "float32", env: dict[str, str] | None = None) -> Server:
    flags = ("--dtype", dtype, "--context-length", "4096", *NEXTN, "3")
    return Forked(folder, *flags, env=FIXED | (env or {})).wait()


def answers(server: Server) -> list[Answer]:
    """Tokens, log-probabilities and accepted drafts, one request at a time."""
    return [answer for prompt in PROMPTS for answer in server.greedy([prompt], 24, **LOGPROBS)]


def refused(server: Server, path: str, **body: Any) -> str:
    """The message of a 400."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        server.post(path, **body)
    assert raised.value.code == 400
    return json.load(raised.value)["message"]


def post(server: Server, path: str, **body: Any) -> None:
    """An update that is not refused."""
    try:
        server.post(path, **body)
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["message"]) from error


def read(server: Server, folder: Path) -> None:
    """Let it read a folder."""
    post(server, "/update_weights_from_disk", model_path=str(folder))


def send(server: Server, folder: Path, ranks: int = 1) -> None:
    """Send it the tensors of a folder in three calls, by value."""
    with session(server):
        for first in range(3):
            payload = packed(stored(folder)[first::3])
            post(server, UPDATE, serialized_named_tensors=[payload] * ranks)


@contextmanager
def session(server: Server, **options: Any) -> Iterator[None]:
    """The calls between begin and end; `options` are those of the begin."""
    post(server, "/begin_weight_update", **options)
    yield
    post(server, "/end_weight_update")


@contextmanager
def during(server: Server, path: str, **body: Any) -> Iterator[None]:
    """What the server waits for as it answers a request."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, path, **body)
        yield
        answer.result(60)


def stored(folder: Path) -> Named:
    return sorted(load_file(folder / "model.safetensors").items())


def packed(tensors: Any, dump: Callable[[Any], bytes] = pickle.dumps) -> str:
    """One rank's payload: tensors by value, unless another function dumps them."""
    return base64.b64encode(dump(tensors)).decode()
