"""The plugin and its `sgl_kernel` in processes of SGLang: what fits, what ends them, what stays."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from forks import Ended, Forks
from page_faults import FEW, MANY

PLUGINS = "from sglang.srt.plugins import load_plugins; load_plugins()"
RENAMED = (
    "import sglang.srt.speculative.draft_utils as m; m.DraftBackendFactory._make_backend = "
    "m.DraftBackendFactory._create_backend; del m.DraftBackendFactory._create_backend"
)
CHANGED = (
    "import sglang.srt.arg_groups.speculative_hook as m; m._handle_eagle_family = "
    "lambda server_args, model_config: None"
)
OTHER_VERSION = (
    "import importlib.metadata as m; real = m.version\n"
    "import qwen3next_plugin.versions as v\n"
    "v.version = lambda name: '0.6.0' if name == 'sglang' else real(name)\n"
)
STATE = (
    "import os; from sglang.srt.platforms import current_platform as p; "
    "from sglang.srt.plugins.hook_registry import HookRegistry as H; "
    "print(type(p).__name__, len(H._hooks), os.environ.get('SGLANG_EXTERNAL_MODEL_PACKAGE'))"
)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Ended]]:
    """Runs code in a process of SGLang whose plugins are not loaded yet."""
    forks = Forks("engines.sglang.unplugged")
    yield forks.run
    forks.close()


# the plugin -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "env", "message"),
    [
        (RENAMED, {}, "has no sglang.srt.speculative.draft_utils.DraftBackendFactory._create_back"),
        (CHANGED, {}, "_handle_eagle_family(server_args, model_config); this plugin was written"),
        (OTHER_VERSION, {}, "sglang 0.6.0 is outside the range this plugin is tested with"),
        ("", {"QWEN3NEXT_KERNEL": "cpu"}, "did you mean QWEN3NEXT_KERNELS?"),
    ],
    ids=["renamed", "changed", "version", "variable"],
)
def test_what_does_not_fit_ends_the_process(run, code, env, message):
    done = run(f"{code}\n{PLUGINS}; print('went on')", **env)
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert "qwen3next_plugin cannot be used: " in done.stderr
    assert message in done.stderr


def test_optional_goes_on_with_the_hosts_model(run):
    done = run(f"{RENAMED}; {PLUGINS}; {STATE}", QWEN3NEXT_OPTIONAL="1")
    assert done.returncode == 0, done.stderr
    assert "SGLang keeps its own Qwen3-Next" in done.stderr
    assert done.stdout.split()[1:] == ["0", "None"]


def test_disabled_leaves_the_host_untouched(run):
    """No patch, no platform of ours, and no new variable."""
    variables = "print({k for k in os.environ if k not in before and k.startswith('SGLANG')})"
    done = run(
        f"import os; before = dict(os.environ); {PLUGINS}; {STATE}; {variables}",
        QWEN3NEXT_DISABLE="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["CpuSRTPlatform 0 None", "set()"]


def test_doctor_reads_what_serves_without_the_plugin(run):
    """SGLang's own models; of Qwen4-Exp it has none by these names."""
    found = "from qwen3next_plugin.engines.sglang.plugin import registered; print(registered())"
    done = run(found, QWEN3NEXT_DISABLE="1")
    assert done.returncode == 0, done.stderr
    modules = ast.literal_eval(done.stdout.splitlines()[-1])
    assert modules.pop("platform") == "cpu"
    assert modules["Qwen3NextForCausalLM"].startswith("sglang.srt.models.")
    assert not any("qwen3next_plugin" in module for module in modules.values())


def test_another_platform_leaves_nothing_behind(run):
    other = "import sglang.srt.platforms as p; p._current_platform = p.CpuSRTPlatform()"
    done = run(f"{other}; {PLUGINS}; {STATE}", QWEN3NEXT_OPTIONAL="1")
    assert done.returncode == 0, done.stderr
    assert "SGLang runs on CpuSRTPlatform, not on the plugin's platform" in done.stderr
    assert done.stdout.split() == ["CpuSRTPlatform", "0", "None"]


def test_registered_once_however_often_it_is_asked():
    """In a process where nothing was prepared."""
    again = "from qwen3next_plugin import register_sglang as again; again(); again()"
    count = (
        "from sglang.srt.plugins.hook_registry import HookRegistry as H; "
        "print({len(hooks) for hooks in H._hooks.values()})"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("QWEN3NEXT_", "SGLANG_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{PLUGINS}; {again}; {PLUGINS}; {STATE}; {count}"],
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{1}"
    assert done.stdout.splitlines()[-2].startswith("CpuPlatform ")


@pytest.mark.parametrize(
    ("ours", "drafts", "model", "kept"),
    [
        (True, None, "Qwen3NextForCausalLM", True),
        (True, "NEXTN", "Qwen3NextForCausalLM", False),
        (True, "NEXTN", "Qwen3NextForCausalLMMTP", True),
        (False, None, "LlamaForCausalLM", False),
    ],
)
def test_freed_memory_is_kept_once_the_last_model_is_loaded(run, ours, drafts, model, kept):
    done = run(
        "from types import SimpleNamespace\n"
        "from page_faults import page_faults\n"
        "from sglang.srt import runtime_context\n"
        "from qwen3next_plugin.engines.sglang import names\n"
        "from qwen3next_plugin.engines.sglang.cpu.platform import CpuPlatform\n"
        f"names.serves_ours = lambda: {ours}\n"
        f"given = SimpleNamespace(speculative_algorithm={drafts!r})\n"
        "runtime_context.get_server_args = lambda: given\n"
        f"CpuPlatform().post_load_model(type({model!r}, (), {{}})())\n"
        "print(page_faults())"
    )
    assert done.returncode == 0, done.stderr
    faults = int(done.stdout.splitlines()[-1])
    assert faults < FEW if kept else faults > MANY


# its `sgl_kernel` -------------------------------------------------------------------------------

HOST_MODULES = (
    "kernels.ops.kvcache.cache_move",
    "kernels.ops.speculative.cache_locs",
    "kernels.ops.speculative.eagle",
    "kernels.ops.speculative.multi_layer_eagle",
    "kernels.ops.speculative.spec_tree",
    "srt.mem_cache.allocation",
    "srt.layers.attention.intel_amx_backend",
    "srt.layers.attention.linear.gdn_backend",
    "srt.layers.attention.linear.kda_backend",
    "srt.layers.attention.linear.kernels.gdn_triton",
    "srt.models.grok",
    "srt.models.muse_glimmer",
    "srt.models.qwen3_5",
    "srt.models.qwen3_next",
    "srt.models.qwen3_next_mtp",
)
IMPORTED = f"""
from importlib import import_module
for name in {HOST_MODULES}:
    import_module("sglang." + name)
from sglang.srt.utils import is_cpu
from sglang.srt.utils.common import _is_intel_amx_backend_available as amx
print(is_cpu(), amx())
"""
FAKES = """
from sglang.srt.model_executor import cpu_graph_runner as graph
graph.register_fake_ops(1)
graph.register_inductor_fallback_ops()
import torch
op, one = torch.ops.sgl_kernel.decode_attention_cpu, torch.tensor([1])
def step(q, cache, o):
    op(q, cache, cache + 1, 1.0, 1.0, o, None, None, one, q, one[None].int(), one - 1, one,
       0.5, 0.0, False, 0, None, None)
    return o + 1
def run(step):
    cache = torch.arange(6.0).view(3, 1, 2)
    return step(torch.ones(1, 1, 2), cache, torch.zeros(1, 1, 2)).tolist()
print(run(step), run(torch.compile(step, backend="aot_eager", fullgraph=True)))
"""
COINS = """
import torch
from sglang.srt.speculative.eagle_utils import _seeded_verify_coins as draw
given = {"sampling_seed": torch.tensor([7] * 3), "draft_token_num": 4, "device": "cpu"}
coins, last = draw(seq_lens=torch.tensor([5, 5, 6]), **given)
drawn = torch.cat([coins, last[:, None]], 1)
print(tuple(drawn.shape), torch.equal(drawn[0], drawn[1]), drawn[1:].unique().numel(),
      bool(((drawn >= 0) & (drawn < 1)).all()))
"""
SAID = {
    "the host imports what takes it at module level": (IMPORTED, "True False"),
    # What its CPU graph does first; torch refuses a second fake for one operator.
    "the host registers its fakes beside ours": (FAKES, "[[[4.0, 5.0]]] [[[4.0, 5.0]]]"),
    # Of a request with a seed: the same in every run, other ones at each position.
    "the host draws seeded coins": (COINS, "(3, 5) True 10 True"),
}


@pytest.mark.parametrize("case", SAID)
def test_the_host_with_our_stand_in(run, case):
    code, said = SAID[case]
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == said
