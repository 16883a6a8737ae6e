"""Chat with a running server; answers are printed as they are generated."""

from typing import Annotated

import typer
from openai import OpenAI, OpenAIError


def main(
    base_url: Annotated[
        str, typer.Option(help="Address of the server's OpenAI-compatible API.")
    ] = "http://localhost:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="Name as the server lists it; the first one by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Chat with the server of `make serve`. An empty line or Ctrl-D ends the chat.

    Every turn sends the whole conversation again. The server finds the earlier
    turns in its prefix cache and computes only the new ones.
    """
    client = OpenAI(base_url=base_url, api_key="unused")
    messages = [{"role": "system", "content": system}] if system else []
    try:
        model = model or client.models.list().data[0].id
        while question := ask():
            messages.append({"role": "user", "content": question})
            answer = client.chat.completions.create(
                model=model,
                messages=messages,
                max_tokens=max_tokens,
                temperature=temperature,
                stream=True,
            )
            messages.append({"role": "assistant", "content": show(answer)})
    except OpenAIError as error:
        typer.echo(f"{base_url}: {error} Is `make serve` running?", err=True)
        raise typer.Exit(1) from error


def ask() -> str:
    """The user's next line; empty when the input ends."""
    try:
        return input("you> ").strip()
    except EOFError:
        return ""


def show(answer) -> str:
    """Print the pieces of an answer as they arrive; return the full text."""
    pieces = []
    for chunk in answer:
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


if __name__ == "__main__":
    typer.run(main)
