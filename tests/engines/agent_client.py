"""A client in Qwen-Agent's environment: the example's agent answers questions, each in turn."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from agent import agent


def main(base_url: str, model: str, body: str, *questions: str) -> None:
    """Print the messages that follow each question as a line of JSON.

    Args:
        body: JSON, more fields of each request.
    """
    with TemporaryDirectory() as folder:
        bot = agent(base_url, model, folder, json.loads(body))
        for question in questions:
            *_, messages = bot.run([{"role": "user", "content": question}])
            print(json.dumps(messages))


if __name__ == "__main__":
    main(*sys.argv[1:])
