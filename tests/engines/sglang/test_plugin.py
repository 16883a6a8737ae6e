"""Patches that no longer fit stop the launch; the plugin registers once, or not at all."""

import os
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest
from packaging.version import Version

pytest.importorskip("sglang")

from qwen3next_plugin.engines import patching
from qwen3next_plugin.engines.patching import (
    Attribute,
    Entry,
    Host,
    Item,
    Override,
    Patch,
    PatchError,
    Replacement,
)

HOST = Host("SGLang", Version("9.9.9"))
FIX = "install a release of qwen3next-plugin that is tested with SGLang 9.9.9"
WHY = {"reason": "a test", "versions": "==9.9.9", "remove_when": "never"}


def applied() -> list[Entry]:
    """The rows of SGLang's table that are applied somewhere."""
    from qwen3next_plugin.engines.sglang.patches import TABLE

    return [entry for entry in TABLE if not isinstance(entry, Override)]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(params=["sglang", "assignment"])
def put(request):
    """How functions are put in place: SGLang's registry, or as in vLLM."""
    from qwen3next_plugin.engines.sglang.patches import register_hooks

    return {"sglang": register_hooks, "assignment": patching.wrap}[request.param]


# what fits --------------------------------------------------------------------------------------


def test_every_patch_fits_the_host():
    patching.check(applied(), HOST)


@pytest.mark.parametrize("i", range(len(applied())), ids=lambda i: applied()[i].target)
def test_a_target_that_is_gone_or_changed_is_named(monkeypatch, i):
    entry = applied()[i]
    owner, _, name = entry.target.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    changed = 5 if isinstance(entry, Attribute) else lambda server_args, other: None
    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(PatchError) as raised:
        patching.check([entry], HOST)
    assert f"SGLang 9.9.9 has {entry.target}" in str(raised.value)
    assert FIX in str(raised.value)
    monkeypatch.delattr(owner, name)
    with pytest.raises(PatchError) as raised:
        patching.check([entry], HOST)
    assert f"SGLang 9.9.9 has no {entry.target}" in str(raised.value) or name == "__init__"
    assert FIX in str(raised.value)


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
    host.LIST, host.DICT = [], {"a": 1}
    monkeypatch.setitem(sys.modules, "a_host", host)
    return host


def test_all_kinds_are_put_in_place(module, put):
    def double(host, *args):
        return 2 * host(*args)

    patching.apply(
        [
            Patch(target="a_host.add", parameters=("a", "b"), function=double, **WHY),
            Patch(target="a_host.Thing.grow", parameters=("self", "by"), function=double, **WHY),
            Attribute(target="a_host.Thing.size", value=property(lambda self: 5), **WHY),
            Attribute(target="a_host.CHOICES", value=("a", "b"), **WHY),
            Attribute(target="a_host.LACKED", value=double, **WHY),
            Item(target="a_host.LIST", value="c", **WHY),
            Item(target="a_host.LIST", value="c", **WHY),
            Item(target="a_host.DICT", key="a", value=2, **WHY),
            Override(target="a_host.Missing.method", file="none.py", **WHY),
        ],
        HOST,
        put,
    )
    thing = module.Thing()
    assert (module.add(1, 2), thing.grow(2), thing.size, module.CHOICES) == (6, 4, 5, ("a", "b"))
    assert module.LACKED is double
    assert (module.LIST, module.DICT) == (["c"], {"a": 2})


def test_a_replacement_is_called_without_the_hosts_function(module):
    replacement = Replacement(
        target="a_host.add", parameters=("a", "b"), function=lambda a, b: a * b, **WHY
    )
    patching.apply([replacement], HOST)
    assert module.add(3, 4) == 12


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Attribute(target="a_host.CHOICES", value=["a"], **WHY),
            "CHOICES as a tuple; this plugin was written for a list",
        ),
        (Item(target="a_host.DICT", value="a", **WHY), "DICT as a dict; .* for a list"),
        (Item(target="a_host.LIST", key="a", value=1, **WHY), "LIST as a list; .* for a dict"),
        (
            Replacement(target="a_host.add", parameters=("a", "c"), function=print, **WHY),
            r"has a_host.add\(a, b\); this plugin was written for \(a, c\)",
        ),
    ],
    ids=["attribute", "list", "dict", "function"],
)
def test_nothing_is_put_in_place_unless_all_fit(module, put, other, message):
    before = module.add
    fits = Patch(target="a_host.add", parameters=("a", "b"), function=print, **WHY)
    with pytest.raises(PatchError, match=message):
        patching.apply([fits, other], HOST, put)
    assert module.add is before


def test_a_patch_that_the_host_only_logs_is_an_error(module):
    from qwen3next_plugin.engines.sglang.patches import register_hooks

    patch = Patch(target="a_host.Thing", parameters=(), function=lambda host: None, **WHY)
    with pytest.raises(PatchError, match=r"SGLang 9\.9\.9 accepts no patch of a_host\.Thing"):
        patching.apply([patch], HOST, register_hooks)


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
    """No patch, no platform of ours, and no new variable."""
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
