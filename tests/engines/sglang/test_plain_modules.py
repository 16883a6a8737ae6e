"""On a GPU SGLang's quantisation leaves the modules that the files have unquantised."""

from types import SimpleNamespace as Bag

import huggingface_hub
import pytest
from transformers import AutoConfig

from engines.hubs import MODEL, downloaded
from quantised import write_partly_quantised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_partly_quantised(tmp_path_factory.mktemp("fp8"))


@pytest.fixture
def made(monkeypatch, folder):
    """What our hook makes of SGLang's quantisation; the prefixes that SGLang's was asked for."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    from qwen3next_plugin.engines.sglang import hooks

    asked: list[str] = []

    def get_quant_method(self, layer, prefix):
        asked.append(prefix)
        return "SGLang's"

    monkeypatch.setattr(Fp8Config, "get_quant_method", get_quant_method)
    monkeypatch.setattr(hooks, "is_ours", lambda model_config: True)
    host = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic")

    def make(model: str = str(folder), download_dir: str | None = None, **changes: object):
        hf_config = AutoConfig.from_pretrained(folder)
        for name, value in changes.items():
            setattr(hf_config, name, value)
        model_config = Bag(model_path=model, revision=None, hf_config=hf_config)
        load_config = Bag(download_dir=download_dir)
        return hooks.leave_plain_modules(lambda *_: host, model_config, load_config)

    return make, host, asked


def test_each_module_by_the_files(made):
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from qwen3next_plugin.engines.sglang.cpu.quantisation import goes_by_files
    from qwen3next_plugin.model.quantisation.modules import served_formats

    make, host, asked = made
    config = make()
    assert isinstance(config, type(host))
    assert goes_by_files(config)  # so the MTP layer's input is quantised as the files say
    assert not goes_by_files(host)
    assert served_formats(config) is None
    projection, experts = LinearBase.__new__(LinearBase), FusedMoE.__new__(FusedMoE)
    for prefix in ("mtp.fc", "model.language_model.layers.0.linear_attn.in_proj_qkvz"):
        assert isinstance(config.get_quant_method(projection, prefix), UnquantizedLinearMethod)
    assert config.get_quant_method(experts, "mtp.layers.0.mlp.experts") is None
    assert not asked  # SGLang makes an unquantised method where there is none
    for prefix in ("model.layers.1.linear_attn.in_proj_qkvz", "visual.blocks.0.attn.qkv"):
        assert config.get_quant_method(projection, prefix) == "SGLang's"
    assert config.get_quant_method(experts, "model.layers.0.mlp.experts") == "SGLang's"
    assert len(asked) == 3


def test_weights_that_sglang_quantises_itself(made):
    make, host, _ = made
    assert make(quantization_config=None) is host


def test_files_are_read_where_sglang_downloads(made, folder, monkeypatch, tmp_path):
    from qwen3next_plugin.engines.sglang import hooks

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make, host, _ = made
    downloads = downloaded(folder, tmp_path)
    assert make(MODEL, downloads) is not host
    hf_config = AutoConfig.from_pretrained(folder)
    model_config = Bag(model_path=MODEL, revision=None, hf_config=hf_config)
    assert hooks.choose_quantisation(None, model_config, Bag(download_dir=downloads)).formats
