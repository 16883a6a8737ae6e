"""Generate with transformers, with and without the checkpoint's MTP head: the text is the same."""

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
        int, typer.Option(min=1, max=8, help="Tokens the MTP head drafts in each step.")
    ] = 3,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 96,
    dtype: Annotated[
        str, typer.Option(help="float32: equal token for token. bfloat16: near ties may flip.")
    ] = "float32",
) -> None:
    """Continue PROMPTS in one batch, first as transformers does, then with drafts.

    The exit status is 1 if a text differs.
    """
    import qwen3next_plugin  # slow to import transformers, so not for --help

    qwen3next_plugin.register_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    inputs = tokenizer(prompts or PROMPTS, return_tensors="pt", padding=True)
    length, texts = inputs["input_ids"].shape[1], {}
    for name, drafts in {
        "plain": {},
        "use_mtp": {"use_mtp": True, "num_assistant_tokens": draft_tokens},
    }.items():
        start = time.perf_counter()
        answers = loaded.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, **drafts)
        seconds = time.perf_counter() - start
        texts[name] = tokenizer.batch_decode(answers[:, length:], skip_special_tokens=True)
        print(f"{name}: {answers[:, length:].numel() / seconds:.1f} tokens per second")
    for prompt, text in zip(prompts or PROMPTS, texts["use_mtp"], strict=True):
        print(f"--- {prompt!r}\n{text}\n")
    if texts["plain"] != texts["use_mtp"]:
        print("the texts differ")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
