"""What `qwen3next plan` says of a server without flags is what vLLM's configuration gets."""

import json

from vllm.engine.arg_utils import EngineArgs

from command_line import run


def test_the_cache_takes_what_plan_says(grant_memory, checkpoint):
    grant_memory(6 << 30)
    flags = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    drafts = {"method": "qwen3_next_mtp", "num_speculative_tokens": 2}
    asked = EngineArgs(model=str(checkpoint), speculative_config=drafts, **flags)
    cache = asked.create_engine_config().cache_config.kv_cache_memory_bytes
    options = ("--memory", 6, "--max-model-len", 512, "--dtype", "float32", "--json")
    done = run("plan", checkpoint, *options, "--num-speculative-tokens", 2)
    assert cache == json.loads(done.stdout)["by_default"]["pools"]
