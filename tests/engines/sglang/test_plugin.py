"""Hooks that no longer fit stop the launch; the plugin registers once, or not at all."""

import os
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest
from packaging.version import Version

pytest.importorskip("sglang")

from qwen3next_plugin.engines import patching as seams
from qwen3next_plugin.engines.patching import Attribute, Hook, SeamError
from qwen3next_plugin.engines.sglang import plugin

VERSION = Version("9.9.9")
MEND = "install a release of qwen3next-plugin that is tested with SGLang 9.9.9"


def all_seams():
    from qwen3next_plugin.engines.sglang.patches import (
        ANYWHERE,
        ELSEWHERE,
        ON_CPU,
        ON_GPU,
        WITH_OURS,
    )

    return [*ANYWHERE, *WITH_OURS, *ON_CPU, *ON_GPU, *ELSEWHERE]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    from sglang.srt.plugins import load_plugins

    load_plugins()


# what fits --------------------------------------------------------------------------------------


def test_every_seam_fits_the_host():
    seams.check(all_seams(), VERSION)


@pytest.mark.parametrize("i", range(len(all_seams())), ids=lambda i: all_seams()[i].target)
def test_a_seam_that_is_gone_or_changed_is_named(monkeypatch, i):
    seam = all_seams()[i]
    owner, _, name = seam.target.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    changed = 5 if isinstance(seam, Attribute) else lambda server_args, other: None
    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(SeamError) as raised:
        seams.check([seam], VERSION)
    assert f"SGLang 9.9.9 has {seam.target}" in str(raised.value)
    assert MEND in str(raised.value)
    monkeypatch.delattr(owner, name)
    with pytest.raises(SeamError) as raised:
        seams.check([seam], VERSION)
    assert f"SGLang 9.9.9 has no {seam.target}" in str(raised.value) or name == "__init__"
    assert MEND in str(raised.value)


@pytest.fixture
def module(monkeypatch):
    """A module of a host, with a function, a class and a property."""
    host = ModuleType("a_host")

    class Thing:
        @property
        def size(self):
            return 1

        def grow(self, by):
            return by

    host.Thing, host.add, host.CHOICES, host.LACKED = Thing, lambda a, b: a + b, ("a",), None
    monkeypatch.setitem(sys.modules, "a_host", host)
    return host


def test_hooks_and_attributes_are_put_in_place(module):
    def double(host, *args):
        return 2 * host(*args)

    seams.put(
        [
            Hook(target="a_host.add", parameters=("a", "b"), around=double),
            Hook(target="a_host.Thing.grow", parameters=("self", "by"), around=double),
            Attribute(target="a_host.Thing.size", value=property(lambda self: 5)),
            Attribute(target="a_host.CHOICES", value=("a", "b")),
            Attribute(target="a_host.LACKED", value=double),
        ],
        VERSION,
        plugin._apply,
    )
    thing = module.Thing()
    assert (module.add(1, 2), thing.grow(2), thing.size, module.CHOICES) == (6, 4, 5, ("a", "b"))
    assert module.LACKED is double


def test_nothing_is_put_in_place_unless_all_fit(module):
    before = module.add
    fits = Hook(target="a_host.add", parameters=("a", "b"), around=print)
    other = Attribute(target="a_host.CHOICES", value=["a"])
    with pytest.raises(SeamError, match="CHOICES as a tuple; this plugin was written for a list"):
        seams.put([fits, other], VERSION, plugin._apply)
    assert module.add is before


def test_a_hook_that_the_host_only_logs_is_an_error(module):
    hook = Hook(target="a_host.Thing", parameters=(), around=lambda host: None)
    with pytest.raises(SeamError, match=r"SGLang 9\.9\.9 takes no hook at a_host\.Thing"):
        seams.put([hook], VERSION, plugin._apply)


# in a process of its own ------------------------------------------------------------------------

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


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("QWEN3NEXT_", "SGLANG_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        check=False,
    )


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
def test_what_does_not_fit_ends_the_process(code, env, message):
    done = run(f"{PREPARE}; {code}\n{PLUGINS}; print('went on')", **env)
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert "qwen3next_plugin cannot be used: " in done.stderr
    assert message in done.stderr


# What SGLang imports before plugins load, with what lets it import without a GPU.
PREPARE = (
    "import os; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'; "
    "from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide; provide()"
)
STATE = (
    "import os; from sglang.srt.platforms import current_platform as p; "
    "from sglang.srt.plugins.hook_registry import HookRegistry as H; "
    "print(type(p).__name__, len(H._hooks), os.environ.get('SGLANG_EXTERNAL_MODEL_PACKAGE'))"
)


def test_optional_goes_on_with_the_hosts_model():
    done = run(f"{PREPARE}; {RENAMED}; {PLUGINS}; {STATE}", QWEN3NEXT_OPTIONAL="1")
    assert done.returncode == 0, done.stderr
    assert "SGLang keeps its own Qwen3-Next" in done.stderr
    assert done.stdout.split()[1:] == ["0", "None"]


def test_disabled_leaves_the_host_untouched():
    """No hook, no platform, and no variable that was not there."""
    variables = "print({k for k in os.environ if k not in before and k.startswith('SGLANG')})"
    done = run(
        f"{PREPARE}; before = dict(os.environ); {PLUGINS}; {STATE}; {variables}",
        QWEN3NEXT_DISABLE="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["CpuSRTPlatform 0 None", "set()"]


def test_another_platform_leaves_nothing_behind():
    other = "import sglang.srt.platforms as p; p._current_platform = p.CpuSRTPlatform()"
    done = run(f"{PREPARE}; {other}; {PLUGINS}; {STATE}", QWEN3NEXT_OPTIONAL="1")
    assert done.returncode == 0, done.stderr
    assert "SGLang runs on CpuSRTPlatform, not on the plugin's platform" in done.stderr
    assert done.stdout.split() == ["CpuSRTPlatform", "0", "None"]


def test_registered_once_however_often_it_is_asked():
    again = "from qwen3next_plugin import register_sglang as again; again(); again()"
    count = (
        "from sglang.srt.plugins.hook_registry import HookRegistry as H; "
        "print({len(hooks) for hooks in H._hooks.values()})"
    )
    done = run(f"{PLUGINS}; {again}; {PLUGINS}; {STATE}; {count}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{1}"
    assert done.stdout.splitlines()[-2].startswith("CpuPlatform ")
