"""Weights of a plain checkpoint, quantised as they load: round to nearest, by row or group."""

import functools
import re
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packing import GROUPS
from qwen3next_plugin.model.checkpoint.errors import MIXED
from qwen3next_plugin.model.formats import PLAIN, Formats, Shapes, Stored, matrices
from qwen3next_plugin.model.quantised import Format, Module, Scheme

# Few rows that decide much: gates and decays of linear attention, the MTP layer's input.
KEPT = re.compile(r"(in_proj_(ba|b|a)|\.fc)$")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
HEAD_FORMAT = Format("int8", 0, torch.float32)  # as `packed.pack_head` packs
SMALLEST = 1e-8  # a scale: of rows that are all zeros


def quantising(name: str, shapes: Shapes, holder: Callable[[str], str]) -> Formats:
    """The formats of a plain checkpoint's modules if it is quantised to `int8` or `int4`.

    The output head has none: it loads as it is, and `packed.pack_head` quantises it to int8.

    Args: as of `read_formats`.
    """
    stored = {}
    for weight, (rows, columns) in matrices(shapes).items():
        module = weight.removesuffix(".weight")
        chosen = _scheme(name, columns)
        if chosen and not PLAIN.search(module) and not KEPT.search(module):
            whole = Module(module, rows, columns, {})
            stored[module] = Stored(whole, frozenset(("weight",)), *chosen)
    return Formats(stored, shapes, holder, _saving(name, shapes))


def quantised_bytes(name: str, shapes: Shapes) -> dict[str, int]:
    """Bytes of each weight that is quantised to `int8` or `int4`; a tied head is a copy."""
    found = {HEAD: HEAD_FORMAT.nbytes(*shapes[EMBEDDING])}
    for weight, (rows, columns) in matrices(shapes).items():
        module = weight.removesuffix(".weight")
        chosen = _scheme(name, columns)
        if chosen and not PLAIN.search(module) and not KEPT.search(module):
            found[weight] = chosen[1].nbytes(rows, columns)
    return found


def _saving(name: str, shapes: Shapes) -> str:
    """The line that an engine logs."""
    found, all_of_them = quantised_bytes(name, shapes), {HEAD: (), **matrices(shapes)}
    before, after = sum(2 * prod(shapes.get(w, (0,))) for w in found), sum(found.values())
    head = "" if HEAD in shapes else ", a copy of the embeddings"
    return (
        f"QWEN3NEXT_QUANTISE={name}: {len(found)} of {len(all_of_them)} matrices take "
        f"{after / 2**30:.2f} GiB, in bfloat16 {before / 2**30:.2f}; the output head is int8{head};"
        f" embeddings, routers, in_proj_ba and mtp.fc stay as they are"
    )


def _scheme(name: str, columns: int) -> tuple[Scheme, Format] | None:
    """How a weight with so many columns is quantised; None: it cannot be.

    int8 has a scale a row; int4 one for the largest group, of 128 at most, that divides a row.
    """
    group = 0
    if name == "int4":
        group = next((g for g in reversed(GROUPS) if columns % g == 0), -1)
    if group < 0:
        return None
    form = Format(name, group, torch.bfloat16 if group else torch.float32)
    rows = functools.partial(_quantised, form=form)
    return Scheme(("weight",), (), lambda module: form, rows), form


def _quantised(module: Module, form: Format) -> dict[str, Tensor]:
    """Shapes: those of `Format.tensors(N, K)`."""
    if module.shape("weight") != (module.rows, module.columns):
        raise module.refuse(
            f"weight has shape {module.shape('weight')}, the config asks for "
            f"{(module.rows, module.columns)}",
            MIXED,
        )
    grouped = module.tensors["weight"].float().unflatten(1, (-1, form.group or module.columns))
    most = grouped.abs().amax(dim=-1)  # [N, G]
    if form.name == "int8":
        scale = (most / 127).clamp(min=SMALLEST)
        values = (grouped / scale[..., None]).round().flatten(1).to(torch.int8)
    else:  # -8 to 7: the largest is -8 times the scale, or as near as 7 times it
        signed = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        scale = torch.where(signed.abs() < SMALLEST, SMALLEST, signed / -8).to(form.scale)
        values = (grouped / scale[..., None]).round().clamp(-8, 7).add(8).flatten(1)
        values = values.to(torch.uint8)
        values = values[:, ::2] | values[:, 1::2] << 4
    return {"weight": values, "weight_scale": scale}
