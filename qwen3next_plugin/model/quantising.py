"""Weights of a plain checkpoint, quantised as they load: round to nearest, by row or group."""

import functools
import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packing import GROUPS
from qwen3next_plugin.model.formats import PLAIN, Formats, Shapes, Stored, matrices
from qwen3next_plugin.model.layouts import MIXED
from qwen3next_plugin.model.quantised import Format, Module, Scheme

# Few rows that decide much: gates and decays of linear attention, the MTP layer's input.
KEPT = re.compile(r"(in_proj_(ba|b|a)|\.fc)$")
SMALLEST = 1e-8  # a scale: of rows that are all zeros


def quantising(name: str, shapes: Shapes, holder: Callable[[str], str]) -> Formats:
    """The formats of a plain checkpoint's modules if it is quantised to `int8` or `int4`.

    Args: as of `read_formats`.
    """
    stored, found = {}, matrices(shapes)
    for weight, (rows, columns) in found.items():
        module = weight.removesuffix(".weight")
        chosen = _scheme(name, columns)
        if chosen and not PLAIN.search(module) and not KEPT.search(module):
            whole = Module(module, rows, columns, {})
            stored[module] = Stored(whole, frozenset(("weight",)), *chosen)
    return Formats(stored, shapes, holder, _saving(name, stored.values(), len(found)))


def _saving(name: str, quantised: Collection[Stored], matrices: int) -> str:
    """The line that an engine logs."""
    before = after = 0
    for stored in quantised:
        rows, columns = stored.module.rows, stored.module.columns
        before += 2 * rows * columns
        for shape, dtype in stored.format.tensors(rows, columns).values():
            after += shape[0] * shape[1] * dtype.itemsize
    return (
        f"QWEN3NEXT_QUANTISE={name}: {len(quantised)} of {matrices} matrices take "
        f"{after / 2**30:.2f} GiB, in bfloat16 {before / 2**30:.2f}; embeddings, the output head, "
        f"routers, in_proj_ba and mtp.fc stay as they are"
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
