"""How many log-probabilities one request of a server may ask for, in either engine."""

# For the prompt and all answers. Each takes about 350 B until the request is answered: 350 MiB for
# 262,144 tokens with three alternatives each, or 50,000 tokens with 20 alternatives.
MOST = 2**20


def answer_tokens(
    field: str, *, prompt: int, each: int, n: int, tokens: int, room: int, most: int = MOST
) -> int:
    """How many tokens an answer may have.

    Fewer than `tokens` only if those fill the context's `room`, as they do without max_tokens.

    Args:
        field: names of the request's fields, for the error.
        prompt: log-probabilities of the prompt's tokens.
        each: of a token of an answer.
        n: answers.
        most: log-probabilities that the request's other prompts leave.

    Raises:
        ValueError: they are too many; names the field.
    """
    fits = (most // n - prompt) // each if each else tokens
    if prompt * n > most or fits < (1 if tokens >= room else tokens):
        asked = n * (prompt + each * tokens)
        raise ValueError(
            f"{field} asks for {asked} log-probabilities of the prompt and {n} answers of up to "
            f"{tokens} tokens; a request may have {MOST}, of which {most} are left for this "
            "prompt: lower these, n or max_tokens, or send fewer prompts"
        )
    return min(tokens, fits)
