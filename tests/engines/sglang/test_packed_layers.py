"""Packed weights: once, and no update afterwards."""

from types import SimpleNamespace as Bag

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module", autouse=True)
def loaded():
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture
def projection():
    """A bf16 projection, whose weight stays with the caller, and its method."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from qwen3next_plugin.engines.sglang.cpu.quantisation import use_packing

    weight = torch.randn(48, 33, dtype=torch.bfloat16)
    layer = nn.Module()
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.quant_method = UnquantizedLinearMethod()
    use_packing(layer, None)
    return layer, weight


def test_a_second_pass_over_packed_weights_leaves_them(projection):
    """SGLang's sessions for updates end with one, also where every update was refused."""
    layer, weight = projection
    layer.quant_method.process_weights_after_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 33, dtype=torch.bfloat16)
    got, want = layer.quant_method.apply(layer, x), x.double() @ weight.double().T
    assert (got - want).norm() / want.norm() < 8e-3


def test_the_mtp_layer_becomes_int8_but_for_its_router_and_its_input(monkeypatch):
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from qwen3next_plugin.engines.sglang.cpu.quantisation import use_packing

    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    model = nn.ModuleDict({"fc": nn.Module(), "layer": nn.ModuleDict()})
    model["layer"].update({"o_proj": nn.Module(), "gate": nn.Module()})
    parts = {"fc": model["fc"], **model["layer"]}
    for part in parts.values():
        part.weight = nn.Parameter(torch.randn(48, 32).bfloat16(), requires_grad=False)
        part.quant_method = UnquantizedLinearMethod()
    use_packing(model, None, drafting=model["layer"])
    for part in parts.values():
        part.quant_method.process_weights_after_loading(part)
    encodings = {name: part.packed.encoding for name, part in parts.items()}
    assert encodings == {"fc": "bf16", "o_proj": "int8", "gate": "bf16"}


@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("asked", ["none", "invariant", "int8", "checkpoint"])
def test_logits_in_fp32(monkeypatch, asked, in_fp32):
    """Our kernels give them, asked or not; oneDNN, where none of ours is chosen, has none such.

    A quantised checkpoint's head, which is int8 otherwise, then stays as it is stored.
    """
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod

    from qwen3next_plugin.engines.sglang.cpu import quantisation
    from qwen3next_plugin.model.quantisation.modules import Formats
    from qwen3next_plugin.model.quantisation.packing import Packed

    monkeypatch.setattr("qwen3next_plugin.kernels.native.levels", lambda: ["avx2"])
    monkeypatch.setattr(quantisation, "get_server_args", lambda: Bag(speculative_algorithm=None))
    monkeypatch.setattr(quantisation, "_is_tied", lambda head: False)
    if asked == "invariant":
        monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    elif asked == "int8":
        monkeypatch.setenv("QWEN3NEXT_QUANTISE", asked)
    weight = torch.randn(48, 33, dtype=torch.bfloat16)
    head = nn.Module()
    head.weight = nn.Parameter(weight.clone(), requires_grad=False)
    head.quant_method = UnquantizedEmbeddingMethod()
    formats = Formats({}, {}, str) if asked in ("int8", "checkpoint") else None
    quantisation.use_packing(head, formats, head, head_in_fp32=in_fp32)
    head.quant_method.process_weights_after_loading(head)
    packed = getattr(head, "packed", None)
    ours = asked in ("invariant", "int8") or (asked == "checkpoint" and not in_fp32)
    assert isinstance(packed, Packed) == ours
    assert (packed is None) == (not ours and in_fp32)
    assert packed is None or not head.weight.numel()
    processor = quantisation.PackedLogitsProcessor.__new__(quantisation.PackedLogitsProcessor)
    processor.use_fp32_lm_head = in_fp32
    x = torch.randn(5, 33, dtype=torch.bfloat16)
    logits, want = processor._compute_lm_head(x, head), x.double() @ weight.double().T
    rounded = asked == "none" and not in_fp32
    assert logits.dtype == (torch.bfloat16 if rounded else torch.float32)
    as_int8 = asked == "int8" or (asked == "checkpoint" and not in_fp32)
    bound = 1e-2 if as_int8 else (8e-3 if rounded else 1e-6)
    assert (logits - want).norm() / want.norm() < bound


@pytest.mark.parametrize("name", ["trunk.Qwen3NextForCausalLM", "mtp.Qwen3NextForCausalLMMTP"])
def test_every_update_of_weights_is_refused(monkeypatch, name):
    from pkgutil import resolve_name

    from sglang.srt.model_executor.model_runner_components import weight_updater

    owner = resolve_name(f"qwen3next_plugin.engines.sglang.model.{name}")
    model = owner.__new__(owner)
    nn.Module.__init__(model)
    monkeypatch.setattr(weight_updater, "get_model", lambda: Bag(weight_cache_mode="off"))
    updater = weight_updater.WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=None,
        custom_weight_loaders={},
        get_model=lambda: nn.ModuleList([model]),
        update_model_fields=None,
        recapture_cuda_graph=None,
        get_model_runner=None,
    )
    answers = [
        updater.update_weights_from_disk("other", "auto"),
        updater.load_weights_from_distributed([]),
        updater.update_weights_from_tensor([]),
        updater.update_weights_from_ipc(None),
    ]
    for success, reason in answers:
        assert not success
        assert reason.endswith("restart the server with the new checkpoint")


@pytest.mark.parametrize("levels", [["avx2"], ["avx2", "avx512", "avx512bf16"]], ids=str)
def test_only_our_product_is_merged_with_others(projection, monkeypatch, levels):
    """Without bf16 instructions a projection is oneDNN's, under the same name."""
    from qwen3next_plugin.kernels import native
    from qwen3next_plugin.model.projection import packed_weight

    monkeypatch.setattr(native, "levels", lambda: levels)
    layer, _ = projection
    layer.quant_method.process_weights_after_loading(layer)
    assert (packed_weight(layer) is None) == (levels == ["avx2"])
