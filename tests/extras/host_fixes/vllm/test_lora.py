"""An adapter that vLLM would load in part is refused, and what it would have replaced stays."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_greedy
from engines.lora import make_adapter, write_adapter
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from reference import Reference

pytestmark = pytest.mark.serve


def test_an_adapter_of_a_layer_that_is_not_there(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    merged = Reference(model)
    adapter = make_adapter(tmp_path / "adapter", merged)
    tensors = load_file(adapter / "adapter_model.safetensors")
    stray = {name.replace(".layers.0.", ".layers.99."): t for name, t in tensors.items()}
    other, prompts = write_adapter(tmp_path / "other", stray, ["out_proj"]), [random_prompt(65)]
    engine = Offline(model, dtype="float32", enable_lora=True, max_model_len=2048)
    try:
        for _ in range(2):
            outputs = engine.greedy(prompts, 4, adapter=str(adapter), **LOGPROBS)
            check_greedy(merged, prompts, outputs)
            assert "take no adapter here" in engine.inside("replace_adapter", str(other), 1)
        with pytest.raises(AssertionError, match=r"changes \d+ modules that take no adapter here"):
            engine.greedy(prompts, 1, adapter=str(other))
    finally:
        engine.close()
