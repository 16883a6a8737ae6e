"""examples/train_tiny: twenty steps of the script, its checkpoint, and the recipe's parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is run from the repository's root, not installed

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer, Qwen3NextForCausalLM  # noqa: E402

from examples.train_tiny import recipe as r  # noqa: E402
from examples.train_tiny.acceptance import Drafter, Tally, measure  # noqa: E402
from examples.train_tiny.architecture import TinyQwen3Next, tiny_config  # noqa: E402
from examples.train_tiny.corpus import IM_END, chat  # noqa: E402
from examples.train_tiny.export import load, released_tensors  # noqa: E402
from examples.train_tiny.speed import bf16_experts  # noqa: E402

D, E, WIDE, HEAD = 256, 16, 64, 256
MTP_SHAPES = {
    "mtp.fc.weight": (D, 2 * D),
    "mtp.pre_fc_norm_embedding.weight": (D,),
    "mtp.pre_fc_norm_hidden.weight": (D,),
    "mtp.norm.weight": (D,),
    "mtp.layers.0.input_layernorm.weight": (D,),
    "mtp.layers.0.post_attention_layernorm.weight": (D,),
    "mtp.layers.0.self_attn.q_proj.weight": (2 * 2 * HEAD, D),
    "mtp.layers.0.self_attn.k_proj.weight": (HEAD, D),
    "mtp.layers.0.self_attn.v_proj.weight": (HEAD, D),
    "mtp.layers.0.self_attn.o_proj.weight": (D, 2 * HEAD),
    "mtp.layers.0.self_attn.q_norm.weight": (HEAD,),
    "mtp.layers.0.self_attn.k_norm.weight": (HEAD,),
    "mtp.layers.0.mlp.gate.weight": (E, D),
    "mtp.layers.0.mlp.shared_expert.gate_proj.weight": (WIDE, D),
    "mtp.layers.0.mlp.shared_expert.up_proj.weight": (WIDE, D),
    "mtp.layers.0.mlp.shared_expert.down_proj.weight": (D, WIDE),
    "mtp.layers.0.mlp.shared_expert_gate.weight": (1, D),
}
for expert in range(E):
    path = f"mtp.layers.0.mlp.experts.{expert}"
    MTP_SHAPES[f"{path}.gate_proj.weight"] = MTP_SHAPES[f"{path}.up_proj.weight"] = (WIDE, D)
    MTP_SHAPES[f"{path}.down_proj.weight"] = (D, WIDE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder that twenty small steps of the script leave behind."""
    out = tmp_path_factory.mktemp("tiny")
    size = "--steps 20 --rows 1 --length 64 --accumulate 2 --no-compiled --corpus-percent 5"
    size += " --log-every 5"
    command = [sys.executable, "-m", "examples.train_tiny.train", "--out", str(out), *size.split()]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return out


@pytest.fixture(scope="module")
def model():
    """A model with random weights."""
    torch.manual_seed(0)
    return TinyQwen3Next(tiny_config()).eval()


def test_the_loss_falls(checkpoint):
    log = [json.loads(line) for line in (checkpoint / "train_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [5, 10, 15, 20]
    for term in ("lm", "mtp1", "mtp3"):
        assert log[-1][term] < log[0][term]


def test_transformers_loads_the_trunk_strictly(checkpoint):
    _, info = Qwen3NextForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())


def test_mtp_has_the_released_names_and_shapes(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items() if n.startswith("mtp.")} == MTP_SHAPES
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_what_is_loaded_is_what_was_saved(checkpoint):
    saved = load_file(checkpoint / "model.safetensors")
    again = released_tensors(load(checkpoint))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_config_says_what_engines_ask_for(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["Qwen3NextForCausalLM"]
    assert (config["full_attention_interval"], config["num_nextn_predict_layers"]) == (4, 1)
    assert config["dtype"] == "bfloat16"


def test_the_chat_template_is_what_training_saw(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert chat("What?", "That.").startswith(text)
    assert tokenizer.eos_token == IM_END
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_router_rows_have_one_norm(model):
    r.normalise_router_rows(model)
    routers = [m for m in model.modules() if isinstance(m, r.Qwen3NextTopKRouter)]
    assert len(routers) == 5
    for router in routers:
        torch.testing.assert_close(router.weight.norm(dim=-1), torch.ones(E))


def test_balance_over_micro_batches_is_the_single_big_batch():
    torch.manual_seed(0)
    parts = [torch.randn(7, E) + 2 * torch.randn(E) for _ in range(3)]  # each skewed its own way
    accumulated = r.Balance(across=True)
    for part in parts:
        accumulated.loss([part], top_k=4)
    terms = [r.balance_term(accumulated.counts[0], part, top_k=4) for part in parts]
    whole = r.Balance(across=True).loss([torch.cat(parts)], top_k=4)
    torch.testing.assert_close(torch.stack(terms).mean(), whole)
    alone = [r.Balance(across=False).loss([part], top_k=4) for part in parts]
    assert torch.stack(alone).mean() > whole


def test_balance_is_one_when_tokens_are_shared_evenly():
    assert r.balance_term(torch.full((E,), 3.0), torch.zeros(12, E), 4).item() == pytest.approx(1)


def test_decay_reaches_zero_centred_norms_only_with_the_recipe(model):
    centred = {id(m.weight) for m in model.modules() if isinstance(m, r.Qwen3NextRMSNorm)}
    gated = {id(m.weight) for m in model.modules() if isinstance(m, r.Qwen3NextRMSNormGated)}
    decayed, kept = r.decay_groups(model, r.Recipe())
    assert centred <= {id(p) for p in decayed["params"]}
    assert gated <= {id(p) for p in kept["params"]}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    decayed, _ = r.decay_groups(model, r.Recipe(norm_decay=False))
    assert not centred & {id(p) for p in decayed["params"]}


def test_learning_rate_warms_up_holds_and_decays():
    recipe = r.Recipe()
    rates = [r.learning_rate(x, recipe) for x in (0.0, 0.02, 0.04, 0.5, 0.7, 0.85, 1.0)]
    assert rates[0] < rates[1] < rates[2] == rates[3] == rates[4] > rates[5] > rates[6] > 0


def test_experts_in_bf16_are_transformers_experts(model):
    experts = model.mtp.layers[0].mlp.experts
    x, weights = torch.randn(11, D), torch.rand(11, 4)
    chosen = torch.rand(11, E).topk(4).indices
    ours, theirs = bf16_experts(experts, x, chosen, weights), experts(x, chosen, weights)
    assert (ours - theirs).norm() / theirs.norm() < 8e-3


@torch.inference_mode()
def test_the_cached_drafter_is_the_training_forward(model):
    ids = torch.randint(3, 4096, (1, 24))
    hidden = model.hidden(ids)
    depth_1 = model.drafts(ids, hidden[:, :-1], depths=1)[0]
    drafter, tokens = Drafter(model), []
    for known in (5, 6, 9, 24):
        tokens.append(drafter.draft(ids[0, :known], hidden[0, : known - 1], 3)[0])
    expected = model.trunk.lm_head(depth_1[0]).argmax(-1)
    assert tokens == [expected[known - 2].item() for known in (5, 6, 9, 24)]


def test_acceptance_counts_drafts_and_runs(model):
    tally = Tally(3)
    for run in (0, 3, 1, 3):
        tally.add(run)
    assert tally.summary()["given_previous"] == [3 / 4, 2 / 3, 1.0]
    assert tally.summary()["tokens_per_step"] == 1 + 7 / 4
    served = Tally(3)
    written = measure(model, torch.randint(3, 4096, (2, 9)), 8, served)
    assert len(written) == 2
    assert all(1 <= len(ids) <= 8 for ids in written)
    assert served.drafts >= 2
