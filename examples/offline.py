"""Generate without a server, through vLLM's own LLM class, which loads the plugin by itself."""

import time
from typing import Annotated

import typer

PROMPTS = ["import os\n\n\ndef walk(top):\n", "class Stack:\n    def __init__(self):\n"]


def main(
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue.")] = None,
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, or a name on the hub.")
    ] = "examples/qwen3next-tiny",
    draft_tokens: Annotated[
        int, typer.Option(help="Tokens the MTP head drafts in each step; 0 turns it off.")
    ] = 2,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    tensor_parallel_size: Annotated[int, typer.Option(help="Devices to split a layer over.")] = 1,
    cache_gib: Annotated[int, typer.Option(help="Memory for keys, values and states.")] = 1,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile first: a slower start, faster steps.")
    ] = False,
) -> None:
    """Continue PROMPTS with a Qwen3-Next model, in this process.

    vLLM loads every installed plugin as it starts, so nothing here imports
    qwen3next_plugin; a line in the log shows that it is in use. Set
    QWEN3NEXT_DISABLE=1 to run vLLM's own model instead.
    """
    from vllm import LLM, SamplingParams  # slow to import, so not for --help

    llm = LLM(
        model=model,
        speculative_config=speculation(draft_tokens),
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=2048,
        kv_cache_memory_bytes=cache_gib << 30,
        enforce_eager=not compiled,
    )
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    start = time.perf_counter()
    requests = llm.generate(prompts or PROMPTS, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    llm.llm_engine.engine_core.shutdown()  # and what it logs, before the answers
    for request in requests:
        print(f"--- {request.prompt!r}\n{request.outputs[0].text}\n")
    generated = sum(len(request.outputs[0].token_ids) for request in requests)
    print(f"{generated} tokens in {seconds:.2f} s")


def speculation(draft_tokens: int) -> dict | None:
    """vLLM's `speculative_config` with the checkpoint's own MTP head as drafter."""
    if draft_tokens == 0:
        return None
    return {"method": "mtp", "num_speculative_tokens": draft_tokens}


if __name__ == "__main__":  # vLLM's workers import this file again
    typer.run(main)
