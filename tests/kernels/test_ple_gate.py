"""Per-layer embeddings: the gate, and the whole layer of it, the convolution and n-gram rows."""

from types import SimpleNamespace

import pytest
import torch
from rings import Rings
from state_pages import Step
from torch import Tensor
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from qwen3next_plugin.kernels.dilated_conv1d import dilated_conv1d
from qwen3next_plugin.kernels.ngram_embedding import NgramTable, ngram_embedding, ngram_hash
from qwen3next_plugin.kernels.ple_gate import PLENorms, ple_gate
from tolerances import assert_close

OP, EPS = "ple_gate", 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HC, N, HEADS, VOCAB, TABLE, DRAFTS = 3, 3, 4, 50, 101, 2
EOS = 3


class PLE:
    """transformers' layer with random weights, and ours of its parts."""

    def __init__(self, D: int, dtype: torch.dtype = torch.float32):
        config = SimpleNamespace(
            hidden_size=D, hc_count=HC, ple_embed_dim=2 * HEADS * 5, ple_conv_kernel_size=4,
            ngram_size=N, rms_norm_eps=EPS, heads_per_ngram=HEADS, vocab_size=VOCAB, seed=1234,
            ngram_vocab_size_base=TABLE, eos_token_id=EOS, make_ngram_vocab_size_divisible_by=128,
        )  # fmt: skip
        self.module = Qwen4ExpTextPLELayer(config, 0, 0).requires_grad_(False)
        for weight in self.module.parameters():
            weight.copy_(torch.randn(weight.shape).to(dtype))
        self.norms = PLENorms(
            *(
                getattr(self.module, f"norm_{name}").weight.to(dtype)
                for name in ("query", "key", "conv")
            )
        )
        self.D, self.dtype = D, dtype

    def inputs(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Streams, keys and values with gaps between the tokens."""
        D = self.D
        streams = torch.randn(T, HC + 1, D).to(self.dtype)[:, :HC]
        keys = torch.randn(T, HC * D + 3).to(self.dtype)[:, : HC * D]
        return streams, keys, torch.randn(T, D + 1).to(self.dtype)[:, :D]

    def gate(self, streams_, keys, values, **given) -> tuple[Tensor, Tensor]:
        return ple_gate(
            streams_=streams_, keys=keys, values=values, norms=self.norms, eps=EPS, **given
        )


def equation(ple: PLE, streams, keys, values) -> tuple[Tensor, Tensor]:
    """In fp64."""

    def norm(x, weight):
        x = x.double()
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return x * (1 + weight.double().view(x.shape[1:]))

    query, key = norm(streams, ple.norms.query), norm(keys.unflatten(1, (HC, -1)), ple.norms.key)
    score = (query * key).sum(-1, keepdim=True) / ple.D**0.5
    gate = (score.sign() * score.abs().clamp_min(1e-6).sqrt()).sigmoid()
    gated = gate * values.double()[:, None]
    return gated.flatten(1), norm(gated.to(ple.dtype), ple.norms.conv).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 37])
@pytest.mark.parametrize("D", [17, 48])
def test_against_the_equation(cpu_backend, T, D, dtype):
    ple = PLE(D, dtype)
    streams, keys, values = ple.inputs(T)
    block, injection = torch.randn(T, D).to(dtype), torch.rand(T, HC)
    added = streams.float() + injection[:, :, None] * block.float()[:, None]
    outs = ple.gate(streams, keys, values, block=block, injection=injection)
    assert_close(OP, dtype, streams, added)
    for ours, expected in zip(outs, equation(ple, streams, keys, values), strict=True):
        assert (ours.dtype, ours.shape) == (dtype, (T, HC * D))
        assert_close(OP, dtype, ours, expected)


def test_scores_without_a_sign(cpu_backend):
    """Of zero the gate is a half; of a little more, the sigmoid of the least root."""
    ple = PLE(16)
    streams, keys, values = ple.inputs(2)
    streams[0] = 0
    streams[1], keys[1] = 1e-12, 1e-12
    gated, _ = ple.gate(streams, keys, values)
    assert_close(OP, torch.float32, gated[0], (values[0] / 2).repeat(HC))
    expected, _ = equation(ple, streams, keys, values)
    assert_close(OP, torch.float32, gated[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_batch(bits_level, dtype):
    ple, T = PLE(48, dtype), 300
    streams, keys, values = ple.inputs(T)
    whole = ple.gate(streams, keys, values)
    for begin, end in ((0, 1), (7, 12), (299, 300)):
        part = ple.gate(streams[begin:end], keys[begin:end], values[begin:end])
        for ours, of_all in zip(part, whole, strict=True):
            assert torch.equal(ours, of_all[begin:end])


def test_the_layer_of_the_model(cpu_backend):
    """Of a whole sequence, and in chunks with drafts of which tokens are rejected."""
    D, T = 24, 50
    ple = PLE(D)
    module = ple.module
    tokens, streams = torch.randint(0, 8, (T,)), torch.randn(T, HC, D)
    expected = streams.flatten(1) + module(streams.flatten(1)[None], tokens[None], None)[0]
    hashing = ngram_hash(
        ngram_size=N, heads_per_ngram=HEADS, vocab_size=VOCAB, table_size=TABLE, layer=0, seed=1234,
        eos=EOS,
    )  # fmt: skip
    table = NgramTable.of([module.ple_embedding.ngram_embedding.weight.data], mapped=False)
    history = Rings(1, N + DRAFTS, dtype=torch.int32)
    conv = Rings(1, 3 * N + 1 + DRAFTS, HC * D, dtype=torch.float32)

    def layer(ids, x, c):
        step = Step(((0, c, len(ids)),)).bundle()
        embedded = ngram_embedding(
            token_ids=ids, table=table, hashing=hashing, tokens_=history.rings, span=conv.span,
            step=step, out_dtype=x.dtype,
        )  # fmt: skip
        keys, values = module.key_proj(embedded), module.value_proj(embedded)
        gated, normed = ple.gate(x, keys, values)
        return x.flatten(1) + gated + dilated_conv1d(
            x=normed, weight=module.conv1d.weight[:, 0], dilation=N, conv_=conv.rings,
            span=conv.span, step=step,
        )  # fmt: skip

    assert_close(OP, torch.float32, layer(tokens, streams, 0), expected)
    outs = [layer(tokens[:20], streams[:20], 0)]
    for c in range(20, T, 2):
        conv.set_span(0, c, c)
        draft, wrong = torch.cat([tokens[c : c + 2], torch.tensor([7])]), torch.randn(1, HC, D)
        outs.append(layer(draft, torch.cat([streams[c : c + 2], wrong]), c)[:2])
        conv.set_span(0, c, c + 3)
    assert_close(OP, torch.float32, torch.cat(outs), expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"streams_": torch.zeros(2, 72)}, "streams_ has shape"),
        ({"keys": torch.zeros(2, 71)}, "keys has shape"),
        ({"values": torch.zeros(2, 24).bfloat16()}, "values is torch.bfloat16"),
        ({"injection": torch.zeros(2, 3)}, "injection is given, but no block"),
        ({"norms": PLENorms(*[torch.zeros(24)] * 3)}, "norms.query has shape"),
        (
            {"norms": PLENorms(torch.zeros(72), torch.zeros(72).bfloat16(), torch.zeros(72))},
            "norms.key is torch.bfloat16",
        ),
    ],
)
def test_refuses(cpu_backend, change, complaint):
    arguments = {
        "streams_": torch.zeros(2, 3, 24), "keys": torch.zeros(2, 72),
        "values": torch.zeros(2, 24), "norms": PLENorms(*torch.zeros(3, 72)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"ple_gate: .*{complaint}"):
        ple_gate(**{**arguments, **change}, eps=EPS)
