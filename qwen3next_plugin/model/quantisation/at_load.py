"""Weights of a plain checkpoint, quantised as they load: which, and to which format."""

import functools
import re
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.kernels.checks import ACTIVATIONS
from qwen3next_plugin.kernels.linear import quantise_int4
from qwen3next_plugin.kernels.linear.pack import one_group
from qwen3next_plugin.kernels.linear.packed_weight import GROUPS, packed_shapes
from qwen3next_plugin.kernels.linear.reference import SMALLEST
from qwen3next_plugin.model.checkpoint.layouts import Shapes
from qwen3next_plugin.model.checkpoint.tensors import EMBEDDING, HEAD
from qwen3next_plugin.model.quantisation.format import Format, Module, Scheme
from qwen3next_plugin.model.quantisation.modules import (
    MIXING_WEIGHTS,
    PLAIN,
    Formats,
    Stored,
    matrices,
)

# Small and sensitive: gates and decays of linear attention, the MTP layer's input, n-grams, what
# injects into streams and chooses blocks. Stream mixers are packed as int8, but not here.
KEPT = re.compile(
    r"(in_proj_(ba|b|a)|\.fc|\.fc_(embedding|hidden)|\.index_qk_proj"
    r"|hyper_connection\w*\.\w+|\.ple\.\w+)$"
)
# Full attention is int8 even for `int4`: its projections lose the most perplexity at 4 bits.
IN_INT8 = re.compile(r"\.self_attn\.[qkvo]_proj$")
INT8 = Format("int8", 0, torch.float32)  # also of the head and of stream mixers


def check_at_load(*, on_cpu: bool) -> None:
    """Refuse QWEN3NEXT_QUANTISE on a GPU. Raises: ConfigError."""
    if not on_cpu and (asked := env.quantise()):
        raise ConfigError(
            f"QWEN3NEXT_QUANTISE={asked}: weights are quantised at load on a CPU alone; unset it"
        )


def formats_at_load(name: str, shapes: Shapes, holder: Callable[[str], str]) -> Formats:
    """The formats of a plain checkpoint's modules if it is quantised to `int8` or `int4`.

    The output head and stream mixers have none: they load as they are, and are packed as int8
    (`packed.plain_as_int8`).

    Args: as of `modules.stored_formats`.
    """
    stored = {
        module.name: Stored(module, frozenset(("weight",)), _scheme(form), form)
        for module, form in _chosen(name, shapes)
    }
    note, doing = _saving(name, shapes), f"quantising to {name}"
    return Formats(stored, shapes, holder, note=note, doing=doing)


def plain_bytes(shapes: Shapes) -> dict[str, int]:
    """Bytes of the weights that become int8 without a format; a tied head is copied."""
    if env.head() != "auto":
        return {}
    found = {HEAD: INT8.nbytes(*shapes[EMBEDDING])}
    for name in filter(MIXING_WEIGHTS.search, shapes):
        group = one_group("int8", shapes[name][-1])
        lines, scales = packed_shapes("int8", shapes[name], group)  # may be padded
        found[name] = prod(lines) + 4 * prod(scales)
    return found


def quantised_bytes(name: str, shapes: Shapes) -> dict[str, int]:
    """Bytes of each weight that is quantised to `int8` or `int4`."""
    found = plain_bytes(shapes)
    for module, form in _chosen(name, shapes):
        found[f"{module.name}.weight"] = form.nbytes(module.channels, module.columns)
    return found


def _saving(name: str, shapes: Shapes) -> str:
    """The line that an engine logs."""
    found, all_of_them = quantised_bytes(name, shapes), {HEAD: (), **matrices(shapes)}
    before, after = sum(2 * prod(shapes.get(w, (0,))) for w in found), sum(found.values())
    copied = "" if HEAD in shapes else ", a copy of the embeddings"
    mixers = any(map(MIXING_WEIGHTS.search, shapes))
    if HEAD in found:
        head = f"the output head is int8{copied}; " + "stream mixers are int8; " * mixers
    else:
        head = "output head, " + "stream mixers, " * mixers
    attention = "" if name == "int8" else "full attention's projections are int8; "
    return (
        f"QWEN3NEXT_QUANTISE={name}: {len(found)} of {len(all_of_them)} matrices take "
        f"{after / 2**30:.2f} GiB, in bfloat16 {before / 2**30:.2f}; {attention}{head}"
        f"embeddings, routers, in_proj_ba and mtp.fc stay as they are"
    )


def _chosen(name: str, shapes: Shapes) -> Iterator[tuple[Module, Format]]:
    """The modules that are quantised, and to which format."""
    for weight, (channels, columns) in matrices(shapes).items():
        module = weight.removesuffix(".weight")
        form = INT8 if name == "int8" or IN_INT8.search(module) else _int4(columns)
        if form and not PLAIN.search(module) and not KEPT.search(module):
            yield Module(module, channels, columns, {}), form


@functools.cache
def _int4(columns: int) -> Format | None:
    """int4 with the largest group, up to 128, that divides the columns; None: none does."""
    groups = (g for g in reversed(GROUPS) if columns % g == 0)
    return next((Format("int4", group, torch.bfloat16) for group in groups), None)


def _scheme(form: Format) -> Scheme:
    return Scheme(
        ("weight",),
        (),
        functools.partial(_checked, form=form),
        functools.partial(_read, form=form),
    )


def _checked(module: Module, *, form: Format) -> Format:
    module.check_weight()
    return form


def _read(module: Module, *, form: Format) -> dict[str, Tensor]:
    """Shapes: those of `Format.tensors(N, K)`."""
    module.check_weight()
    return quantise(module.tensors["weight"], form)


def quantise(weight: Tensor, form: Format) -> dict[str, Tensor]:
    """Round a weight to int8, or to int4 in groups without zero points.

    Shapes: weight [N, K], returns those of `Format.tensors(N, K)`
    """
    if form.encoding == "int8":
        return _int8(weight, form)
    weight = weight if weight.dtype in ACTIVATIONS else weight.float()
    values, scale = quantise_int4(weight, form.group, form.scale)
    return {"weight": values, "weight_scale": scale}


def _int8(weight: Tensor, form: Format) -> dict[str, Tensor]:
    """The largest weight of a group is 127 times the scale."""
    grouped = weight.float().unflatten(1, (-1, form.group or weight.shape[1]))
    scale = (grouped.abs().amax(dim=-1) / 127).clamp(min=SMALLEST)
    values = (grouped / scale[..., None]).round().flatten(1).to(torch.int8)
    return {"weight": values, "weight_scale": scale.to(form.scale)}
