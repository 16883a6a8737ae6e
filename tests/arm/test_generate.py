"""One answer with MTP on aarch64, which `make test-arm` has qemu emulate."""

import pytest
import torch
from tokenizers import Tokenizer

import qwen3next_plugin
from checkpoints import SHIPPED
from needs import needs
from qwen3next_plugin.kernels import native

pytestmark = [
    pytest.mark.long,
    needs("aarch64"),
]


def test_an_answer_with_mtp_is_that_without():
    """Without it, all layers are transformers' own."""
    from transformers import AutoModelForCausalLM

    qwen3next_plugin.register_transformers()
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("def add(a, b):\n    return ").ids])
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    drafted = model.generate(ids, use_mtp=True, num_assistant_tokens=3, **asked)
    assert native.isa() == native.levels()[-1]
    assert torch.equal(drafted, model.generate(ids, **asked))
