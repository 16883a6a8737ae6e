"""The kernels on a real GPU: as the reference, and the same bits in a CUDA graph."""

from dataclasses import replace

import pytest
import torch
from state_pages import Layer, Pool, Shape, Step

from needs import needs
from qwen3next_plugin.kernels.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    Projections,
    gated_delta_net,
)
from tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    needs("gpu"),
]
SHAPE, DRAFTS = Shape(4, 8, 128, 128), 3
STEPS = (
    Step(((5, 0, 900), (0, 0, 4), (3, 0, 1))),
    Step(((2, 0, 130), (-1, 5, 2), (0, 2, 4), (3, 1, 1), (5, 900, 40))),
    Step(((2, 130, 70), (5, 940, 4200), (3, 2, 2))),  # the long one is split
)
SLOTS = sorted({slot for step in STEPS for slot, _, _ in step.rows if slot >= 0})


class Net:
    """A layer's weights and inputs, on the CPU in fp32 and on the GPU in its own dtype."""

    def __init__(self, dtype: torch.dtype):
        torch.manual_seed(4)
        self.dtype, self.layer = dtype, Layer.random(SHAPE, dtype)
        self.norm = torch.randn(SHAPE.V).to(dtype)

    def on_gpu(self) -> None:
        """Move the weights there, since a graph cannot copy from the CPU's memory."""
        self.norm, layer = self.norm.cuda(), self.layer
        self.layer = replace(
            layer,
            weight=layer.weight.cuda(),
            A_log=layer.A_log.cuda(),
            dt_bias=layer.dt_bias.cuda(),
        )

    def inputs(self, T: int) -> list[torch.Tensor]:
        """qkvz and ba of T tokens."""
        widths = SHAPE.C + SHAPE.HV * SHAPE.V, 2 * SHAPE.HV
        return [torch.randn(T, width).to(self.dtype) for width in widths]

    def run(self, pool: Pool, step: Step, inputs: list[torch.Tensor], device: str, dtype=None):
        def there(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, dtype if x.is_floating_point() else None)

        layer, q = self.layer, there(inputs[0])
        out = q.new_empty(len(q), SHAPE.HV * SHAPE.V)
        weights = (layer.weight, layer.A_log, layer.dt_bias, self.norm)
        gated_delta_net(
            projections=Projections(
                *map(there, inputs), GatedDeltaNetShape(SHAPE.H, SHAPE.HV, SHAPE.K, SHAPE.V)
            ),
            weights=GatedDeltaNetWeights(*map(there, weights), 1e-6),
            pool_=pool.pages(),
            step=replace(
                step.bundle(), **{name: x.to(device) for name, x in step.tensors().items()}
            ),
            out_=out,
        )
        return out


def pool_on(device: str, dtype: torch.dtype) -> Pool:
    return to(Pool(SHAPE, 7, DRAFTS, dtype), device)


def to(pool: Pool, device: str) -> Pool:
    """The pool, its tensors moved."""
    for name in ("conv_", "state_", "key_", "u_", "g_", "span_"):
        setattr(pool, name, getattr(pool, name).to(device))
    return pool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_the_reference(monkeypatch, dtype):
    net, pool = Net(dtype), pool_on("cuda", dtype)
    steps = [(step, net.inputs(step.T)) for step in STEPS]
    outs = [net.run(pool, step, inputs, "cuda").cpu() for step, inputs in steps]
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    expected = pool_on("cpu", torch.float32)
    for out, (step, inputs) in zip(outs, steps, strict=True):
        ref = net.run(expected, step, inputs, "cpu", torch.float32)
        assert_close("gated_delta_rule", dtype, out, ref, by="triton")
    to(pool, "cpu")
    assert torch.equal(pool.span_, expected.span_)
    for slot in SLOTS:
        ours, theirs = pool.state_at_end(slot), expected.state_at_end(slot)
        assert_close("gated_delta_rule", dtype, ours, theirs, by="triton")
        for part, ref in zip(pool.content(slot), expected.content(slot), strict=True):
            assert_close("gated_delta_rule", dtype, part, ref, by="triton")


def test_captured_and_replayed():
    """A graph of a verify step, replayed on other rows, gives the same bits as a plain launch."""
    net, dtype = Net(torch.bfloat16), torch.bfloat16
    net.on_gpu()
    first, verify = Step(((1, 0, 70), (2, 0, 9))), Step(((1, 70, 4), (2, 9, 2)))
    start, drafts = net.inputs(first.T), net.inputs(verify.T)
    launched, captured = pool_on("cuda", dtype), pool_on("cuda", dtype)
    for pool in (launched, captured):
        net.run(pool, first, start, "cuda")
    inputs = [x.cuda() for x in drafts]
    tensors = {name: tensor.cuda() for name, tensor in verify.tensors().items()}
    slot = tensors["slot"].clone()
    tensors["slot"].fill_(-1)  # captured with rows that own no page, as engines do

    class Static(Step):
        def tensors(self) -> dict[str, torch.Tensor]:
            return tensors

    step = Static(verify.rows)
    net.run(captured, step, inputs, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = net.run(captured, step, inputs, "cuda")
    tensors["slot"].copy_(slot)
    graph.replay()
    assert torch.equal(out, net.run(launched, verify, drafts, "cuda"))
    assert torch.equal(captured.span_, launched.span_)


def test_a_bad_row_is_told_by_a_look_that_does_not_wait():
    from qwen3next_plugin.kernels.gpu import faults

    net, pool = Net(torch.bfloat16), pool_on("cuda", torch.bfloat16)
    step = Step(((9, 0, 2),))
    watch = faults.Watch(torch.device("cuda", 0))
    assert net.run(pool, step, net.inputs(2), "cuda").isnan().all()
    watch.look()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="row 0: slot 9 is not one of 7 slots"):
        watch.look()
    with pytest.raises(RuntimeError, match="row 0: slot 9"):
        faults.check(torch.device("cuda"))
