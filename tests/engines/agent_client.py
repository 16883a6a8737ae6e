"""A client in Qwen-Agent's environment: the example's agent, asked as agents.py says."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from agent import agent


def main(base_url: str, model: str, asked: str) -> None:
    """Print the messages of each conversation as a line of JSON.

    Args:
        asked: JSON, for each question the bodies of the requests that follow it.
    """
    with TemporaryDirectory() as folder:
        bot = agent(base_url, model, folder, {})
        for question, bodies in json.loads(asked).items():
            messages = [{"role": "user", "content": question}]
            for body in bodies:
                bot.llm.generate_cfg["extra_body"] = body
                *_, new = bot.run(messages)
                messages += new
            print(json.dumps(messages))


if __name__ == "__main__":
    main(*sys.argv[1:])
