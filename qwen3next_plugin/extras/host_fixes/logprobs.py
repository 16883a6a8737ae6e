"""How many log-probabilities one request of a server may ask for, in either engine."""

# Of the prompt and of all answers. Each takes some 350 B until the request is answered, so 350 MiB:
# a context of 262,144 tokens with three alternatives each, or 20 alternatives for 50,000 tokens.
MOST = 2**20


def answer_tokens(
    field: str, *, prompt: int, each: int, n: int, tokens: int, room: int, most: int = MOST
) -> int:
    """How many tokens an answer may have.

    Fewer than `tokens` only where these fill the context's `room`, as they do without max_tokens.

    Args:
        field: which fields of the request ask for them.
        prompt: log-probabilities of the prompt's tokens.
        each: of a token of an answer.
        n: answers.
        most: what the request's other prompts leave.

    Raises:
        ValueError: they are too many; names the field.
    """
    fits = (most // n - prompt) // each if each else tokens
    if prompt * n > most or fits < (1 if tokens >= room else tokens):
        asked = n * (prompt + each * tokens)
        raise ValueError(
            f"{field} asks for {asked} log-probabilities of the prompt and {n} answers of up to "
            f"{tokens} tokens; a request may have {most}: lower it, n or max_tokens"
        )
    return min(tokens, fits)
