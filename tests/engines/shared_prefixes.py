"""Prompts that share a prefix, and what is cached of them when they are sent one after another."""

from checkpoints import random_prompt

END = 1  # the token that ends a message, in the random checkpoints
SYSTEM, SHARED, LENGTH = 1500, 1200, 2200  # tokens
TEXTS = [
    random_prompt(SHARED, seed=4) + random_prompt(LENGTH - SHARED, seed=n) for n in range(5, 9)
]


def message(length: int, seed: int) -> tuple[int, ...]:
    return (*random_prompt(length - 1, seed=seed), END)


CHATS = [message(SYSTEM, 9) + message(n, n) + random_prompt(4) for n in (40, 200, 700)]
