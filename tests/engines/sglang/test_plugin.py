"""The patches of SGLang fit, and those that no longer do are named."""

import pkgutil
import sys
from types import ModuleType

import pytest
from packaging.version import Version

from engines.contract import changes
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
    """The patches of SGLang."""
    return [entry for entry in changes("sglang") if not isinstance(entry, Override)]


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
    if hasattr(owner, name):  # a base class's, which may fit
        return
    with pytest.raises(PatchError) as raised:
        patching.check([entry], HOST)
    assert f"SGLang 9.9.9 has no {entry.target}" in str(raised.value)
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

        @classmethod
        def make(cls, size):
            return cls, size

        @staticmethod
        def twice(size):
            return 2 * size

    class Special(Thing):
        pass

    host.Special = Special
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
            Override(target="a_host.Missing.method", **WHY),
        ],
        HOST,
        put,
    )
    thing = module.Thing()
    assert (module.add(1, 2), thing.grow(2), thing.size, module.CHOICES) == (6, 4, 5, ("a", "b"))
    assert module.LACKED is double
    assert (module.LIST, module.DICT) == (["c"], {"a": 2})


def test_methods_of_classes_stay_what_they_are(module, put):
    patching.apply(
        [
            Patch(
                target="a_host.Thing.make",
                parameters=("cls", "size"),
                function=lambda host, cls, size: host(cls, size + 1),
                **WHY,
            ),
            Patch(
                target="a_host.Thing.twice",
                parameters=("size",),
                function=lambda host, size: host(size) + 1,
                **WHY,
            ),
        ],
        HOST,
        put,
    )
    assert module.Special.make(1) == (module.Special, 2)
    assert (module.Thing.twice(3), module.Thing().twice(3)) == (7, 7)


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
