"""What transformers recomputes of texts, as a trainer does, in any environment.

`python recomputed.py FOLDER` reads token ids from its input and writes log-probabilities.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.bits import INVARIANT
from engines.checks import Output

Ids = tuple[int, ...]
ROOT = Path(__file__).parents[2]


def recompute(folder: Path, texts: Sequence[Ids], python: str = sys.executable) -> list[list]:
    """The log-probability of each token of each text but its first."""
    env = os.environ | INVARIANT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [python, __file__, str(folder)]
    done = subprocess.run(command, input=json.dumps(texts), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_recomputed(
    folder: Path,
    prompts: Sequence[Ids],
    outputs: Sequence[Output],
    python: str = sys.executable,
) -> None:
    """An engine's log-probabilities, of prompts and answers, are transformers' to the bit."""
    texts = [ids + one.token_ids for ids, one in zip(prompts, outputs, strict=True)]
    for ids, one, found in zip(prompts, outputs, recompute(folder, texts, python), strict=True):
        assert list(one.prompt_logprobs or ()) == found[: len(ids) - 1], len(ids)
        assert list(one.logprobs or ()) == found[len(ids) - 1 :], len(ids)


def main(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import qwen3next_plugin

    qwen3next_plugin.register_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    texts = [torch.tensor(ids) for ids in json.load(sys.stdin)]
    inputs = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(ids) for ids in texts])
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    logits = model(input_ids=inputs, attention_mask=mask).logits
    found = []
    for ids, of_text in zip(texts, logits, strict=True):
        logprobs = of_text[: len(ids) - 1].log_softmax(-1)
        found.append(logprobs.gather(1, ids[1:, None])[:, 0].tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
