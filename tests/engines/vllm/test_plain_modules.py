"""On a GPU vLLM's quantisation leaves the modules that the files have unquantised."""

from types import SimpleNamespace as Bag

import huggingface_hub
import pytest
from transformers import AutoConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from engines.hubs import MODEL, downloaded
from quantised import write_partly_quantised
from qwen3next_plugin.engines.vllm.cpu import quantisation
from qwen3next_plugin.model.quantisation.modules import served_formats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_partly_quantised(tmp_path_factory.mktemp("fp8"))


@pytest.fixture
def made(monkeypatch, folder):
    """The quantisation of a model's layers where there is a GPU; how often vLLM's was asked."""
    asked: list[str] = []

    def get_quant_method(self, layer, prefix):
        asked.append(prefix)
        return "vLLM's"

    monkeypatch.setattr(Fp8Config, "get_quant_method", get_quant_method)
    monkeypatch.setattr(quantisation, "current_platform", Bag(is_cpu=lambda: False))
    host = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic")

    def make(
        load_format: str = "auto",
        of_files: object = "fp8",
        model: str = str(folder),
        download_dir: str | None = None,
    ):
        model_config = Bag(
            model=model,
            revision=None,
            hf_config=AutoConfig.from_pretrained(folder),
            quantization="fp8",
            model_arch_config=Bag(quantization_config=of_files),
        )
        load_config = Bag(load_format=load_format, download_dir=download_dir)
        config = Bag(quant_config=host, model_config=model_config, load_config=load_config)
        found = quantisation.with_quantisation(config)
        assert config.quant_config is host
        return found.quant_config

    return make, host, asked


def test_each_module_by_the_files(made):
    make, host, asked = made
    config = make()
    assert isinstance(config, Fp8Config)
    assert config is not host
    assert served_formats(config) is None
    projection, experts = LinearBase.__new__(LinearBase), RoutedExperts.__new__(RoutedExperts)
    for prefix in ("mtp.fc", "language_model.model.layers.0.linear_attn.in_proj_qkvz"):
        assert isinstance(config.get_quant_method(projection, prefix), UnquantizedLinearMethod)
    assert config.get_quant_method(experts, "mtp.layers.0.mlp.experts") is None
    assert not asked  # vLLM makes an unquantised method where there is none
    for prefix in ("model.layers.1.linear_attn.in_proj_qkvz", "visual.blocks.0.attn.qkv"):
        assert config.get_quant_method(projection, prefix) == "vLLM's"
    assert config.get_quant_method(experts, "model.layers.0.mlp.experts") == "vLLM's"
    assert len(asked) == 3


@pytest.mark.parametrize("case", [{"load_format": "dummy"}, {"of_files": None}], ids=str)
def test_weights_that_vllm_makes_or_quantises_itself(made, case):
    make, host, _ = made
    assert make(**case) is host


def test_files_are_read_where_vllm_downloads(made, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make, host, _ = made
    config = make(model=MODEL, download_dir=downloaded(folder, tmp_path))
    assert config is not host
    assert config.get_quant_method(LinearBase.__new__(LinearBase), "mtp.fc") != "vLLM's"


def test_formats_are_read_where_vllm_downloads(folder, monkeypatch, tmp_path):
    """Of a quantisation of ours, which vLLM tells no such folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hf_config = AutoConfig.from_pretrained(folder)
    ours = quantisation.Quantisation(hf_config.quantization_config)
    ours.maybe_update_config(MODEL, hf_config)
    load_config = Bag(download_dir=downloaded(folder, tmp_path))
    found = quantisation.choose_quantisation(
        Bag(quant_config=ours, model_config=Bag(), load_config=load_config)
    )
    assert served_formats(found)
