"""Hide three numbers in a long text, and ask a running server for each of them."""

import random
import time
from typing import Annotated

import typer
from openai import OpenAI, OpenAIError

DEPTHS = (0.1, 0.5, 0.9)  # of the text, where a number is hidden
SAMPLE = 100  # lines that are sent first, to learn how many tokens a line has


def main(
    base_url: Annotated[
        str, typer.Option(help="Address of the server's OpenAI-compatible API.")
    ] = "http://localhost:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="Name as the server lists it; the first one by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2000, help="Length of the text.")] = 30_000,
) -> None:
    """Show how much of a long text the server's model finds again, and how fast it reads.

    The text is Python source: assignments of numbers to names. Each question repeats one name.
    The server reads the text once; it finds it in its prefix cache for the other questions.
    """
    client = OpenAI(base_url=base_url, api_key="unused", timeout=3600)
    try:
        model = model or client.models.list().data[0].id
        sample = ask(client, model, "".join(filler(SAMPLE)), 1)
        lines = int(tokens / sample.usage.prompt_tokens * SAMPLE)
        text, hidden = haystack(lines)
        for depth, name, number in hidden:
            start = time.perf_counter()
            answer = ask(client, model, f"{text}\n# again\n{name} = ", 8)
            seconds = time.perf_counter() - start
            said = answer.choices[0].text.strip().split("\n")[0]
            verdict = "found" if said.startswith(str(number)) else "not found"
            typer.echo(
                f"{verdict:9} at {depth:.0%} of {answer.usage.prompt_tokens} tokens:"
                f" {name} = {number}, answer {said!r}, {seconds:.1f} s"
            )
    except OpenAIError as error:
        typer.echo(f"{base_url}: {error} Is a server running?", err=True)
        raise typer.Exit(1) from error


def ask(client: OpenAI, model: str, prompt: str, tokens: int):
    """The likeliest continuation."""
    return client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0)


def filler(lines: int) -> list[str]:
    """Lines that assign a number to a name."""
    numbers = random.Random(0)
    return [f"value_{i} = {numbers.randrange(10_000)}\n" for i in range(lines)]


def haystack(lines: int) -> tuple[str, list[tuple[float, str, int]]]:
    """A text with a number hidden at each depth; the depths, names and numbers."""
    text, numbers = filler(lines), random.Random(1)
    hidden = [(depth, f"hidden_at_{depth:.0%}"[:-1], numbers.randrange(10_000)) for depth in DEPTHS]
    for depth, name, number in reversed(hidden):
        text.insert(int(depth * lines), f"{name} = {number}\n")
    return "".join(text), hidden


if __name__ == "__main__":
    typer.run(main)
