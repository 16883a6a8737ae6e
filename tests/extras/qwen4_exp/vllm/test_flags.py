"""vLLM's flags for Qwen4-Exp: what is refused at load, by name, and what is planned for it."""

import pytest

from extras.qwen4_exp.model import write_qwen4_exp
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.plan import Flags, make_plan
from qwen3next_plugin.engines.vllm.blocks import Blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen4_exp(tmp_path_factory.mktemp("qwen4_exp"))


@pytest.fixture
def complete():
    """vLLM completes its configuration, as it does before it starts a worker."""
    from vllm.engine.arg_utils import EngineArgs

    def run(model, **flags):
        flags = {"dtype": "bfloat16", "max_model_len": 512, "enforce_eager": True} | flags
        return EngineArgs(
            model=str(model), skip_tokenizer_init=True, **flags
        ).create_engine_config()

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enable_lora": True}, "enable_lora: adapters of a model with several streams"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype = fp8: .* leave out --kv-cache-dtype"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds: n-grams are of tokens"),
        ({"load_format": "dummy"}, "load_format = dummy: the table of n-grams is read from"),
        ({"hf_overrides": {"hc_count": 1}}, "hc_count"),
        ({"hf_overrides": {"indexer_compress_ratio": 64}}, "indexer_compress_ratio = 64"),
    ],
    ids=str,
)
def test_flags_are_refused_by_name(complete, folder, flags, message):
    with pytest.raises(Exception, match=message):
        complete(folder, **flags)


def test_positions_of_a_wrapped_model_have_one_axis(complete, tmp_path):
    rope = {
        "rope_type": "default",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    wrapped = write_qwen4_exp(tmp_path, wrapped=True, rope_parameters=rope)
    config = complete(wrapped, speculative_config=drafts)
    assert not config.model_config.uses_mrope
    assert not config.speculative_config.draft_model_config.uses_mrope
    assert config.model_config.multimodal_config is None


def test_the_plan_counts_what_n_grams_and_indexer_keep(folder):
    config = Qwen3NextConfig.from_hf(read_config(folder))
    flags = Flags(
        max_model_len=512,
        max_num_seqs=8,
        num_speculative_tokens=2,
        dtype="bfloat16",
        state_dtype="float32",
        prefix_caching=True,
        memory=2**30,
        threads=1,
    )
    plan = make_plan(Blocks, config, {}, flags)
    assert plan.state_page["n-grams"] == 4 * (3 + 2) + 2 * 4 * 64 * (9 + 1 + 2)
    assert plan.kv_bytes_per_layer == 2 * (2 * 2 * 32 + 2 * 10)  # 16 dims of a key, 4 of a block's
