"""Roll out, update the weights, roll out again: a loop of reinforcement learning without a loss."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

PROMPTS = ["import os\n\n\ndef walk(top):\n", "class Stack:\n    def __init__(self):\n"]


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder.")] = "examples/qwen3next-tiny",
    updates: Annotated[int, typer.Option(help="How often the weights change.")] = 2,
    step_size: Annotated[float, typer.Option(help="Of a weight's own size.")] = 0.05,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 32,
) -> None:
    """Sample answers, change all matrices by a random step, and sample with the new weights.

    A trainer would save its own weights where `step` does: a checkpoint with the same tensors.
    """
    from vllm import LLM, SamplingParams  # slow to import, so not for --help

    llm = LLM(
        model=model,
        speculative_config={"method": "mtp", "num_speculative_tokens": 2},
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
    )
    sampling = SamplingParams(temperature=1.0, seed=0, max_tokens=max_tokens)
    generator = torch.Generator().manual_seed(0)
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        weights = shutil.copytree(model, Path(folder) / "weights")
        for update in range(updates + 1):
            if update:
                step(weights, step_size, generator)
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
            answers += [
                f"--- after {update} updates: {request.prompt!r}\n{request.outputs[0].text}\n"
                for request in llm.generate(PROMPTS, sampling, use_tqdm=False)
            ]
    llm.llm_engine.engine_core.shutdown()  # and what it logs, before the answers
    print(*answers, sep="\n")


def step(folder: Path, size: float, generator: torch.Generator) -> None:
    """Add noise to every matrix of a checkpoint, relative to the spread of its own values."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
                tensors[name] = (tensor.float() + size * noise).to(tensor.dtype)
        fresh = path.with_suffix(".new")
        save_file(tensors, fresh)
        fresh.replace(path)


if __name__ == "__main__":  # vLLM's workers import this file again
    typer.run(main)
