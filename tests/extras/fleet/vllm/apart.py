"""A server that prefills and one that decodes, and what vLLM's toy proxy asks of both."""

import ctypes
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from checkpoints import SHIPPED
from engines.process import free_port
from engines.vllm.offline import environment
from engines.vllm.server import Forked, Server

DRAFTS = 3
FLAGS = {
    "--dtype": "float32",
    "--max-model-len": "2048",
    "--kv-cache-memory-bytes": str(1 << 26),
    "--worker-extension-cls": "extras.fleet.vllm.apart.Blocks",
}
PREFILL_ONLY = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
Prompt = str | tuple[int, ...]


class Blocks:
    """Mixed into vLLM's worker: what is in the blocks that NIXL reads."""

    def blocks(self, numbers: list[int] | None = None) -> list[list[str]]:
        """Of each region a digest of each block, by default of all."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        nixl = get_kv_transfer_group().connector_worker
        ratio = nixl._physical_blocks_per_logical_kv_block
        bases = nixl.kv_caches_base_addr[nixl.engine_id][nixl.tp_rank]
        found = range(nixl._logical_num_blocks) if numbers is None else numbers
        return [
            [digest(base + block * ratio * stride, ratio * stride) for block in found]
            for base, stride in zip(bases, nixl.block_stride_per_layer, strict=True)
        ]


def digest(address: int, nbytes: int) -> str:
    """Of zeros none."""
    content = ctypes.string_at(address, nbytes)
    return sha256(content).hexdigest() if any(content) else ""


def server(role: str, drafts: int = DRAFTS, model: Path = SHIPPED, **settings: Any) -> Forked:
    """One that has a `role`; `settings` are of --kv-transfer-config, or flags."""
    flags = FLAGS | {name: settings.pop(name) for name in list(settings) if name.startswith("-")}
    transfer = {"kv_connector": "NixlConnector", "kv_role": role} | settings
    ranks = int(flags.get("--tensor-parallel-size", 1))
    speculation = {"method": "mtp", "num_speculative_tokens": drafts}
    return Forked(
        model,
        *("--enforce-eager", "--enable-prompt-tokens-details"),
        *(word for pair in flags.items() for word in pair),
        *("--kv-transfer-config", json.dumps(transfer)),
        *(("--speculative-config", json.dumps(speculation)) if drafts else ()),
        env={
            "QWEN3NEXT_DRAFTS": "fixed",  # else a busy machine may find that none pay
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": environment(ranks)["VLLM_CPU_OMP_THREADS_BIND"],
        },
    )


def complete(server: Server, prompt: Prompt, tokens: int = 32, **options: Any) -> dict[str, Any]:
    """Its answer: greedy, unless options say otherwise."""
    body = {"temperature": 0, "ignore_eos": True} | options
    return server.post(
        "/v1/completions", model=server.model, prompt=prompt, max_tokens=tokens, **body
    )


def prefill(server: Server, prompt: Prompt, **options: Any) -> dict[str, Any]:
    """Where the other server finds what this one has computed."""
    found = complete(server, prompt, 1, kv_transfer_params=PREFILL_ONLY, **options)
    return found["kv_transfer_params"]


def apart(first: Server, second: Server, prompt: Prompt, **options: Any) -> dict[str, Any]:
    """The answer of the second server, after the first one's prefill."""
    where = prefill(first, prompt, **{k: v for k, v in options.items() if k != "tokens"})
    return complete(second, prompt, kv_transfer_params=where, **options)


def text(answer: dict[str, Any]) -> str:
    (choice,) = answer["choices"]
    return choice["text"]
