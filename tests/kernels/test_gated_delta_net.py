"""The whole layer as one op: the same outputs and pages as its three parts."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from state_pages import SMALL, Layer, Pool, Shape, Step, int32
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3next_plugin.kernels.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    Projections,
    gated_delta_net,
)
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.model.gated_delta_net import idle_step
from tolerances import assert_close

OP = "gated_delta_rule"
DRAFTS = 2
SHAPES = (SMALL, Shape(1, 2, 32, 48), Shape(2, 2, 24, 17))
# Fresh prefill, padding, verify after a rejected draft, decode, continued prefill, empty.
FIRST = Step(((5, 0, 9), (0, 0, 3), (3, 0, 1)))
SECOND = Step(((2, 0, 70), (-1, 5, 2), (0, 2, 3), (3, 1, 1), (5, 9, 12), (6, 0, 0)))


class Net:
    """A layer with a norm, and its inputs."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, *, sigmoid_gate: bool = False, layout="grouped"
    ):
        self.shape, self.dtype, self.sigmoid_gate = shape, dtype, sigmoid_gate
        self.layout = layout
        self.layer = Layer.random(shape, dtype)
        self.norm = torch.randn(shape.V).to(dtype)

    @property
    def weights(self) -> GatedDeltaNetWeights:
        layer = self.layer
        norm = (self.norm, 1e-6, self.sigmoid_gate)
        return GatedDeltaNetWeights(layer.weight, layer.A_log, layer.dt_bias, *norm)

    def inputs(self, T: int) -> list[torch.Tensor]:
        """qkvz and ba, in rows that are followed by NaN."""
        s = self.shape
        z = torch.randn(T, s.H, s.HV // s.H, s.V).to(self.dtype)
        x = self.layer.projections(T, self.dtype)
        found = []
        for parts in ([x["q"], x["k"], x["v"], z.flatten(2)], [x["b"], x["a"]]):
            if self.layout == "flat":
                parts = [part.flatten(1) for part in parts]
            whole = torch.cat(parts, -1).flatten(1)
            found.append(pad(whole, (0, 8), value=torch.nan)[:, :-8])
        return found

    def __call__(
        self, pool: Pool, step: Step, qkvz: torch.Tensor, ba: torch.Tensor, out_=None
    ) -> torch.Tensor:
        s = self.shape
        if out_ is None:
            out_ = qkvz.new_full((len(qkvz), s.HV * s.V), torch.nan)
        shape = GatedDeltaNetShape(s.H, s.HV, s.K, s.V, self.layout)
        gated_delta_net(
            projections=Projections(qkvz, ba, shape),
            weights=self.weights,
            pool_=pool.pages(),
            step=step.bundle(max_query_len=None if step.rows else 0),
            out_=out_,
        )
        return out_


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        (SHAPES[0], torch.float32, "grouped"),
        (SHAPES[0], torch.float32, "flat"),
        (SHAPES[1], torch.bfloat16, "grouped"),
        (SHAPES[2], torch.float16, "flat"),
    ],
    ids=str,
)
def test_as_its_parts(backend, monkeypatch, shape, dtype, layout):
    net = Net(shape, dtype, sigmoid_gate=shape == SHAPES[1], layout=layout)
    steps = [(step, *net.inputs(step.T)) for step in (FIRST, SECOND)]

    def run() -> tuple[list[torch.Tensor], Pool]:
        pool = Pool(shape, 7, DRAFTS, dtype)
        return [net(pool, *step) for step in steps], pool

    outs, pool = run()
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    expected, reference = run()
    for ours, theirs in zip(outs, expected, strict=True):
        assert_close(OP, dtype, ours, theirs, by=backend)
    assert (outs[1][70:72] == 0).all()
    assert torch.equal(pool.span_, reference.span_)
    for slot in (0, 2, 3, 5):
        ours, theirs = pool.state_at_end(slot), reference.state_at_end(slot)
        assert_close(OP, dtype, ours, theirs, by=backend)
        for ours, theirs in zip(pool.content(slot), reference.content(slot), strict=True):
            assert_close(OP, dtype, ours, theirs, by=backend)
    pool.assert_untouched_but([0, 2, 3, 5, 6])


@pytest.mark.parametrize("name", ["qkvz", "ba", "norm", "out_"])
def test_refuses_bad_arguments(backend, name):
    net, pool, step = Net(SMALL, torch.float32), Pool(SMALL, 1, DRAFTS), Step(((0, 0, 2),))
    x = dict(zip(("qkvz", "ba"), net.inputs(2), strict=True))
    if name == "norm":
        net.norm = net.norm[:-1]
    elif name == "out_":
        x[name] = torch.empty(2, SMALL.HV * SMALL.V + 1)
    else:
        x[name] = x[name][:, :-1]
    with pytest.raises(ValueError, match=f"gated_delta_net: {name} has shape"):
        net(pool, step, **x)


@pytest.mark.parametrize("name", ["qkvz", "ba", "out_"])
def test_refuses_other_strides(backend, name):
    net, pool, step = Net(SMALL, torch.float32), Pool(SMALL, 1, DRAFTS), Step(((0, 0, 2),))
    x = dict(zip(("qkvz", "ba"), net.inputs(2), strict=True))
    if name == "out_":
        x[name] = torch.empty(2, SMALL.HV * SMALL.V + 8)[:, :-8]
    else:
        x[name] = x[name].repeat_interleave(2, dim=1)[:, ::2]
    with pytest.raises(ValueError, match=f"gated_delta_net: .*{name} is not contiguous"):
        net(pool, step, **x)


def test_refuses_heads_that_are_not_shared_evenly(backend):
    net = Net(Shape(2, 3, 16, 24), torch.float32)
    pool, step = Pool(SMALL, 1, DRAFTS), Step(((0, 0, 2),))
    with pytest.raises(ValueError, match="cannot serve 2 key heads with 3 value heads"):
        net(pool, step, torch.zeros(2, 208), torch.zeros(2, 6))


def test_refuses_a_page_that_rolls_back_unequally(backend):
    """Its convolution would forget inputs of tokens that its rule may roll back."""
    net, pool, step = Net(SMALL, torch.float32), Pool(SMALL, 1, DRAFTS), Step(((0, 0, 2),))
    pool.conv_ = pool.conv_[:, 1:]
    with pytest.raises(ValueError, match=f"conv_ rolls back {DRAFTS - 1} tokens, key_ {DRAFTS}"):
        net(pool, step, *net.inputs(2))


def test_a_decay_that_is_no_number_shows(backend):
    net, pool = Net(SMALL, torch.float32), Pool(SMALL, 1, DRAFTS)
    net.layer.dt_bias[:] = torch.nan
    assert net(pool, Step(((0, 0, 2),)), *net.inputs(2))[1].isnan().all()  # token 0 decays nothing


def test_no_rows(backend):
    net, pool = Net(SMALL, torch.float32), Pool(SMALL, 1, DRAFTS)
    assert (net(pool, Step(()), *net.inputs(3)) == 0).all()
    pool.assert_untouched_but([])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
class TestOnTheDevice:
    """A launch cannot raise: what it does about a bad row."""

    @pytest.mark.parametrize(
        ("row", "complaint"),
        [
            ((9, 0, 2), "row 1: slot 9 is not one of 4 slots"),
            ((-2, 0, 2), "row 1: slot -2 is not one of 4 slots"),
            ((1, 5, 1), "row 1: slot 1 holds start=6 end=8 and cannot continue at context"),
            ((1, 9, 70), "row 1: slot 1 holds start=6 end=8 and cannot continue at context"),
            ((2, 4, 1), "row 1: slot 2 is used by an earlier row"),
        ],
    )
    def test_a_bad_row_is_nan_and_its_page_is_left_alone(
        self, backend, monkeypatch, row, complaint
    ):
        from qwen3next_plugin.kernels.gpu import faults

        net, pool = Net(SMALL, torch.float32), Pool(SMALL, 4, DRAFTS)
        pool.raw[2] = 0
        pool.span_[2], pool.span_[1] = int32(4, 4), int32(6, 8)
        before = pool.raw.clone()
        step = Step(((2, 4, 1), row))
        monkeypatch.setattr(faults, "checked", lambda out: out)
        out = net(pool, step, *net.inputs(step.T))
        assert out[0].isfinite().all()
        assert out[1:].isnan().all()
        assert torch.equal(pool.raw[[0, 1, 3]], before[[0, 1, 3]])
        with pytest.raises(RuntimeError, match=complaint):
            faults.check(out.device)
        faults.check(out.device)  # raised once

    @pytest.mark.parametrize("starts", [(0, 1, 3), (0, 2, 1), (-1, 1, 2)])
    def test_tokens_out_of_range(self, backend, monkeypatch, starts):
        net, pool, step = Net(SMALL, torch.float32), Pool(SMALL, 4, DRAFTS), Step(((0, 0, 1),))
        tensors = {
            "query_start_loc": int32(*starts), "slot": int32(0, 1), "context_len": int32(0, 0)
        }  # fmt: skip
        monkeypatch.setattr(Step, "tensors", lambda self: tensors)
        with pytest.raises(RuntimeError, match=r"query_start_loc -?\d to \d is not a range of 2"):
            net(pool, step, *net.inputs(2))

    def test_offsets_beyond_31_bits(self, backend, tmp_path):
        """Pages that lie 2^33 bytes apart, in a sparse file."""
        net, slots, num_drafts = Net(SMALL, torch.bfloat16), 3, DRAFTS
        pool = Pool(SMALL, slots, num_drafts, torch.bfloat16)
        row, apart = pool.raw.shape[1], 2**33
        file = tmp_path / "pages"
        file.touch()
        raw = torch.from_file(str(file), shared=True, size=2 * apart + row, dtype=torch.uint8)
        far = Pool(SMALL, slots, num_drafts, torch.bfloat16)
        for name in ("conv_", "state_", "key_", "u_", "g_", "span_"):
            near = getattr(pool, name)
            begin = near.storage_offset() * near.element_size()
            flat = raw.as_strided((slots, near[0].nbytes), (apart, 1), begin)
            setattr(far, name, flat.view(near.dtype).unflatten(1, near.shape[1:]))
        steps = [Step(((2, 0, 9), (1, 0, 3))), Step(((2, 9, 2), (1, 2, 1)))]
        for step in steps:
            x = net.inputs(step.T)
            assert torch.equal(net(pool, step, *x), net(far, step, *x))
        assert torch.equal(pool.span_[1:], far.span_[1:])
        assert torch.equal(pool.u_[2, 8], far.u_[2, 8])

    @pytest.mark.parametrize("layout", ["grouped", "flat"])
    def test_a_decode_step_is_launches_and_views(self, backend, layout, monkeypatch):
        """The host copies nothing: the only other operators reserve memory for the launches."""
        from qwen3next_plugin.kernels.gated_delta_rule import triton as layer

        called = Counter()

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if not func.is_view:
                    called[func.overloadpacket.__name__] += 1
                return func(*args, **(kwargs or {}))

        for name in ("short_rows", "commit"):
            monkeypatch.setattr(layer, name, defaultdict(lambda: lambda *args, **options: None))
        net = Net(SMALL, torch.bfloat16, layout=layout)
        pool = Pool(SMALL, 4, DRAFTS, torch.bfloat16)
        step = Step(((2, 0, 3), (1, 0, 1)))
        x, out = net.inputs(step.T), torch.empty(step.T, SMALL.HV * SMALL.V).bfloat16()
        faults.record(out.device)  # one per process
        with Calls():
            net(pool, step, *x, out)
        assert called == {"new_empty": 3}

    def test_one_op_in_two_launches(self, backend, split_rows, monkeypatch):
        """Decode and verify take two; prefill rows add three, and two more if a row is split."""
        from qwen3next_plugin.kernels.gated_delta_rule import triton as layer

        scan = ("chunk_matrices", "segment_transitions", "segment_starts", "chunk_scan")
        launched = []
        for name in ("short_rows", "prepare", *scan, "commit"):
            kernel = getattr(layer, name)

            class Counted:
                def __getitem__(self, grid, kernel=kernel, name=name):
                    launched.append(name)
                    return kernel[grid]

            monkeypatch.setattr(layer, name, Counted())
        net, pool = Net(SMALL, torch.float32), Pool(SMALL, 4, DRAFTS)
        step = Step(((2, 0, 3), (1, 0, 1)))
        net(pool, step, *net.inputs(step.T))
        assert launched == ["short_rows", "commit"]
        for row, names in (((0, 0, 5), (scan[0], scan[-1])), ((0, 5, 33), scan)):
            launched.clear()
            step = Step(((2, 2, 1), row))
            net(pool, step, *net.inputs(step.T))
            assert launched == ["short_rows", "prepare", *names, "commit"]
        launched.clear()
        config = replace(split_rows, processors=2 * SMALL.HV - 1)  # more than half are busy
        monkeypatch.setattr(layer, "config_for", lambda device: config)
        step = Step(((0, 38, 33),))
        net(pool, step, *net.inputs(step.T))
        assert launched == ["short_rows", "prepare", scan[0], scan[-1], "commit"]

    def test_an_idle_step_takes_the_scratch_of_any_step(self, backend, split_rows):
        """vLLM measures a step's memory before there are pages."""

        class Scratch(TorchDispatchMode):
            nbytes = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                self.nbytes += out.nbytes if func.overloadpacket.__name__ == "new_empty" else 0
                return out

        net, pool = Net(SMALL, torch.float32), Pool(SMALL, 4, DRAFTS)
        x, out = net.inputs(70), torch.empty(70, SMALL.HV * SMALL.V)
        with Scratch() as idle:
            gated_delta_net(
                projections=Projections(
                    *x, GatedDeltaNetShape(SMALL.H, SMALL.HV, SMALL.K, SMALL.V)
                ),
                weights=net.weights,
                pool_=pool.pages(),
                step=idle_step(70, out.device, rows=4),
                out_=out,
            )
        assert (out == 0).all()
        pool.assert_untouched_but([])
        for rows in (((0, 0, 70),), ((0, 0, 35), (1, 0, 33), (2, 0, 1), (3, 0, 1))):
            with Scratch() as real:
                net(pool, Step(rows), *x, out)
            assert 0 < real.nbytes <= idle.nbytes
            pool.raw.zero_()
