"""Checkpoints in the kernels' own layout, as `qwen3next pack` writes them: loading is reading.

Format 1:

- config.json is the source's, with this quantization_config: quant_method is `qwen3next`;
  format_version 1; quantised what `--quantise` asked for, or null.
- packed_from.json has the source's folder, and of config.json and each weight file size, time of
  change (ns) and SHA-256. It may be missing.
- Safetensors files and their index. A weight of ours that is packed has the tensors `packed`,
  `scale` and, of int4 with zero points, `zero` of `kernels/linear/packed_weight.py`, in their
  shapes and dtypes, under the name of our module: `model.layers.0.linear_attn.in_proj_qkvz.packed`;
  of experts `…mlp.experts.w13` (gate, then up) and `.w2`; the output head's is `lm_head`, also if
  it is tied to the embeddings. All other tensors are the source's, under its names; where only a
  part of a module of ours was quantised, its modules are dequantised, in fp32, under our names.
- A file's metadata has each of its packed weights: encoding, columns that share a scale (0: all of
  them) and shape, as in `int4 128 12288 2048`.
- A file's header is padded to 4096 bytes, and `packed` tensors come first: each of them begins at a
  multiple of 64 bytes, every other tensor of a packed weight at one of its own values.

Nothing depends on an instruction set, an engine or the number of ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.kernels.linear.pack import one_group
from qwen3next_plugin.kernels.linear.packed_weight import (
    GROUPS_OF,
    Encoding,
    PackedWeight,
    packed_shapes,
    scale_dtypes,
)
from qwen3next_plugin.model.checkpoint.contents import mapped, read
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import STORED_DTYPES, nbytes
from qwen3next_plugin.model.checkpoint.headers import Place, read_index, read_places, weight_files
from qwen3next_plugin.model.checkpoint.layouts import Shapes, holder
from qwen3next_plugin.model.checkpoint.mapped import giving_back
from qwen3next_plugin.model.checkpoint.progress import Say
from qwen3next_plugin.model.checkpoint.tensors import EMBEDDING, all_tensors
from qwen3next_plugin.model.quantisation.format import InPanels
from qwen3next_plugin.model.quantisation.modules import Formats, Stored, Stream
from qwen3next_plugin.model.quantisation.original import refuse_changed
from qwen3next_plugin.model.quantisation.schemes import Module, Scheme
from qwen3next_plugin.model.quantisation.stacked import (
    HEAD_MODULE,
    Stacked,
    is_plain,
    stacked_weights,
)

METHOD, VERSION = "qwen3next", 1
AGAIN = "pack it again, by `qwen3next pack MODEL OUT`"


def _no_scheme(module: Module) -> Any:
    raise AssertionError(module.name)


NO_SCHEME = Scheme((), (), _no_scheme, _no_scheme)


def is_packed(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a config.json's quantization_config is of a checkpoint in our layout."""
    return (quantization or {}).get("quant_method") == METHOD


def check_in_panels(formats: Formats | None, *, on_cpu: bool, tp_size: int, say: Say) -> None:
    """Refuse a packed checkpoint on a GPU, and QWEN3NEXT_MMAP where files cannot stay mapped.

    Raises: ConfigError, naming the cause and the fix; also as `refuse_changed`.
    """
    if packed := isinstance(formats, FormatsInPanels):
        if not on_cpu:
            raise ConfigError("the checkpoint is packed for CPUs; serve what it was packed from")
        refuse_changed(formats.folder, say)
    if env.mmap() and not packed:
        raise ConfigError(
            "QWEN3NEXT_MMAP=1: only a checkpoint that `qwen3next pack` wrote stays in its files; "
            "pack this one, or unset it"
        )
    if env.mmap() and tp_size > 1:
        raise ConfigError(
            "QWEN3NEXT_MMAP=1: tensor-parallel ranks would copy their parts of the files; unset "
            "it, or serve on one rank"
        )


def refuse_another(formats: Formats | None) -> None:
    """Refuse to load a packed checkpoint once more: its layers have no parameters.

    Raises: ConfigError, naming the fix.
    """
    if isinstance(formats, FormatsInPanels):
        raise ConfigError(
            "a packed checkpoint is loaded once: restart the server, or serve what it was packed "
            "from, whose weights may change"
        )


def formats_in_panels(
    folder: Path, config: Qwen3NextConfig, quantization: Mapping[str, Any]
) -> "FormatsInPanels":
    """The formats of a packed checkpoint, by its files' headers.

    Raises:
        CheckpointError: of another version, or files that do not fit config.json.
    """
    if (version := quantization.get("format_version")) != VERSION:
        raise CheckpointError(
            f"{folder}: packed in format {version!r}, and this release reads {VERSION}: {AGAIN}"
        )
    wholes = stacked_weights(config)
    weights: dict[str, InPanels] = {}
    places: dict[str, Place] = {}
    for path in weight_files(folder, read_index(folder)):
        metadata, tensors = read_places(path)
        for name, said in metadata.items():
            if name == "format":
                continue
            weights[name] = _format(path, name, said, wholes.get(name), tensors)
            places |= {
                f"{name}.{part}": tensors[f"{name}.{part}"] for part in weights[name].packed_names
            }
    if not weights:
        raise CheckpointError(f"{folder}: no packed weight is in its files: {AGAIN}")
    if env.head() == "plain" and (in_int8 := next(filter(is_plain, weights), None)):
        raise ConfigError(
            f"QWEN3NEXT_HEAD=plain: {in_int8} of {folder} is packed in int8; unset the variable, "
            f"or pack the checkpoint again with it"
        )
    return FormatsInPanels(folder, weights, wholes, places, config)


class FormatsInPanels(Formats):
    """The formats of a packed checkpoint's modules, and its tensors."""

    def __init__(
        self,
        folder: Path,
        weights: Mapping[str, InPanels],
        wholes: Mapping[str, Stacked],
        places: Mapping[str, Place],
        config: Qwen3NextConfig,
    ) -> None:
        shapes = all_tensors(config)
        stored = {}
        for name, form in weights.items():
            for module in () if is_plain(name) else wholes[name].modules:
                channels, columns = shapes[f"{module}.weight"]
                whole = Module(module, channels, columns, {})
                stored[module] = Stored(whole, frozenset(), NO_SCHEME, form)
        super().__init__(
            stored,
            shapes,
            partial(holder, config=config),
            doing=f"{'mapping' if env.mmap() else 'reading'} packed weights",
            packed_plain=frozenset(filter(is_plain, weights)),
            nbytes_in_panels=sum(nbytes(place.header) for place in places.values()),
        )
        self.folder, self.weights = folder, weights
        self._wholes, self._places = wholes, places

    def expected(self, shapes: Shapes) -> Shapes:
        found = {n: s for n, s in shapes.items() if n.removesuffix(".weight") not in self.stored}
        here = set(self._of(shapes))
        for name in here & self.packed_plain:
            found.pop(f"{name}.weight", None)
        for name in here:
            for part in self.weights[name].packed_names:
                found[f"{name}.{part}"] = self._places[f"{name}.{part}"].header.shape
        return found

    def converted(
        self, tensors: Stream, ignored: Iterable[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors; read those of packed weights from their files, not from the engine."""
        left_out = set(self._of(frozenset(ignored)))
        load = mapped if env.mmap() else read
        with giving_back() as done:
            for name, tensor in tensors:
                if (place := self._places.get(name)) is None:
                    yield name, tensor
                    done(tensor)
                elif name.rpartition(".")[0] not in left_out:
                    yield name, tensor if tensor.is_meta else load(place)

    def attached(
        self, tensors: Stream, attach: Callable[[str, PackedWeight], None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in tensors:
            if name not in self._places:
                yield name, tensor
                continue
            weight, _, part = name.rpartition(".")
            waiting[weight][part] = tensor
            del tensor
            form = self.weights[weight]
            if len(waiting[weight]) == len(form.packed_names):
                parts = waiting.pop(weight)
                whole = PackedWeight(
                    encoding=form.encoding,
                    shape=form.shape,
                    group=form.group or one_group(form.encoding, form.shape[-1]),
                    packed=parts["packed"],
                    scale=parts["scale"],
                    zero=parts.get("zero"),
                )
                attach(weight, whole)

    def _of(self, names: Iterable[str]) -> Iterator[str]:
        """The packed weights that hold a module whose weight is in `names`."""
        names = frozenset(names)
        for name in self.weights:
            first = self._wholes[name].modules[0]
            if (EMBEDDING if name == HEAD_MODULE else f"{first}.weight") in names:
                yield name


def _format(
    path: Path, name: str, said: str, whole: Stacked | None, tensors: Mapping[str, Place]
) -> InPanels:
    """The format of a packed weight; raises CheckpointError unless its tensors fit."""
    encoding, _, rest = said.partition(" ")
    numbers = rest.split()
    known = encoding in get_args(Encoding) and all(number.isdecimal() for number in numbers)
    group, *sizes = map(int, numbers) if known and numbers else (-1,)
    fits = known and group in (0, *GROUPS_OF[cast(Encoding, encoding)])
    if not fits or whole is None or tuple(sizes) != whole.shape:
        wanted = whole.shape if whole else "no such weight"
        raise CheckpointError(
            f"{path.name}: {name} is {said!r}, the config asks for {wanted}: config.json and the "
            f"files do not belong together, or are damaged; {AGAIN}"
        )
    encoding = cast(Encoding, encoding)
    shared = group or one_group(encoding, whole.shape[-1])
    lines, entries = packed_shapes(encoding, whole.shape, shared)
    zeros = f"{name}.zero" in tensors
    parts = {"packed": (lines, (torch.uint8,)), "scale": (entries, scale_dtypes(encoding))}
    parts |= {"zero": (entries, (torch.uint8,))} if zeros else {}
    for part, (shape, dtypes) in parts.items():
        place = tensors.get(f"{name}.{part}")
        if place is None or not _fits(place, shape, dtypes):
            found = f"{place.header.dtype} {place.header.shape}" if place else "missing"
            raise CheckpointError(
                f"{path.name}: {name}.{part} is {found}, where {shape} fits: it is damaged; {AGAIN}"
            )
    scale = STORED_DTYPES[tensors[f"{name}.scale"].header.dtype]
    return InPanels(encoding, group, scale, zeros, whole.shape, whole.parts)


def _fits(place: Place, shape: tuple[int, ...], dtypes: Iterable[torch.dtype]) -> bool:
    dtype = STORED_DTYPES.get(place.header.dtype)
    if dtype is None or dtype not in dtypes or place.offset % dtype.itemsize:
        return False
    return place.header.shape == shape
