"""Which format each module of a checkpoint has, read from the headers of its files.

config.json is less exact: each tool names the skipped modules in its own way.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import without_data
from qwen3next_plugin.model.checkpoint.layouts import EXPERT, SHARD, Shapes
from qwen3next_plugin.model.checkpoint.mapped import giving_back
from qwen3next_plugin.model.quantisation.format import Format, Module, Scheme, dequantise
from qwen3next_plugin.model.quantisation.schemes import scheme

Stream = Iterable[tuple[str, torch.Tensor]]
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Modules that have no format: embeddings, routers, and what `packed.plain_as_int8` is about.
PLAIN = re.compile(
    r"(embed_tokens|lm_head|\.gate|\.shared_expert_gate|hyper_connection\w*\.\w+"
    r"|\.ngram_embedding\.shard_\d+)$"
)
# Of these, a hyper-connection's two large weights, the stream mixers.
MIXING_WEIGHTS = re.compile(r"hyper_connection\w*\.input_mix_weight_(down|up)(\.weight)?$")
PREFIXED = re.compile(r"(model\.layers|mtp)\..*")
EXPERT_TENSORS = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}
SCALES = ("weight_scale", "weight_scale_inv", "scales")
KINDS = "FP8, int8, GPTQ, AWQ, compressed-tensors' pack-quantized, NVFP4 and MXFP4"
KV_SCALES = ("k_scale", "v_scale", "output_scale")  # of an FP8 KV cache
NO_PART = ("bias", *KV_SCALES)  # of a weight, beside it


class Stored(NamedTuple):
    """A quantised module as the checkpoint has it."""

    module: Module  # without its tensors
    names: frozenset[str]  # of its tensors
    scheme: Scheme
    format: Format


class Formats:
    """The formats of a checkpoint's modules and of ours, each of which may hold several of those.

    A module of ours has a format if all modules in it have that one. Otherwise they are
    dequantised as they load; `dequantised` names them.
    """

    def __init__(
        self,
        stored: Mapping[str, Stored],
        shapes: Shapes,
        holder: Callable[[str], str],
        *,
        note: str = "",
        doing: str = "loading weights",
        tower: str | None = None,
        packed_plain: frozenset[str] = frozenset(),
        nbytes_in_panels: int = 0,
    ) -> None:
        """The formats of these modules.

        Args:
            stored, shapes, holder: as of `stored_formats`.
            note: a line for the log.
            doing: what is done to the weights as they load.
            tower: a quantised tensor of a vision tower, if one has any.
            packed_plain: weights without a format that the files have packed.
            nbytes_in_panels: bytes of all weights that the files have packed.
        """
        self.stored, self._holder, self._note = stored, holder, note
        self.doing, self.tower = doing, tower
        self.packed_plain, self.nbytes_in_panels = packed_plain, nbytes_in_panels
        found: dict[str, dict[str, set[Format | None]]] = defaultdict(lambda: defaultdict(set))
        for name in shapes:
            module = name.removesuffix(".weight")
            kept = stored[module].format if module in stored else None
            found[holder(module)][_tensor(module)].add(kept)
        self._formats: dict[str, dict[str, Format]] = {}
        for name, tensors in found.items():
            alike = {t: only for t, (only, *more) in tensors.items() if only and not more}
            if len(alike) == len(tensors) and not PLAIN.search(name):
                self._formats[name] = alike
        self.dequantised = [name for name in stored if holder(name) not in self._formats]

    def of(self, prefix: str) -> dict[str, Format] | None:
        """The formats of one of our modules, by its weights; None: it is not quantised.

        Experts have two, `w13` and `w2`; others one, `weight`. A wrapper's prefix is ignored.

        Raises: CheckpointError for a module of a quantised vision tower.
        """
        if self.tower and "visual." in prefix:
            raise CheckpointError(
                f"{self.tower}: a quantised vision tower is not served on a CPU; add "
                f"--language-model-only, or use a checkpoint that leaves the tower unquantised"
            )
        return self._formats.get(without_wrapper(prefix))

    def format_of(self, module: str) -> Format | None:
        """The format in which a module of the checkpoint is served; None: not quantised."""
        served = module in self.stored and self._holder(module) in self._formats
        return self.stored[module].format if served else None

    def described(self) -> str:
        """A line for the log; empty if every module is served in its own format."""
        if not self.dequantised:
            return self._note
        return (
            f"{len(self.dequantised)} quantised modules are dequantised as they load, such as "
            f"{self.dequantised[0]}: they are a router, a head or a stream mixer, or what they are "
            f"stacked with is not quantised alike"
        )

    def expected(self, shapes: Shapes) -> Shapes:
        """The tensors of our parameters, in place of those of the checkpoint with these shapes."""
        found: Shapes = {}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if form := self.format_of(module):
                found |= {f"{module}.{each}": s for each, (s, _) in form.tensors(*shape).items()}
            else:
                found[name] = shape
        return found

    def converted(
        self, tensors: Stream, ignored: Iterable[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a module's tensors in our format once all of them are read, others as they are.

        The caller must copy each tensor before it asks for the next one.
        Leaves out the tensors of modules whose weight is in `ignored`, and the KV cache's scales,
        because that cache has 16 or 32 bits on a CPU.
        """
        waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        ignored = frozenset(ignored)
        with giving_back() as done:
            for name, tensor in tensors:
                module, _, last = name.rpartition(".")
                if last in KV_SCALES:
                    continue
                stored = self.stored.get(module)
                if stored is None or last not in stored.names:
                    yield name, tensor
                    done(tensor)
                    continue
                if f"{module}.weight" in ignored:
                    continue
                waiting[module][last] = tensor
                if len(waiting[module]) == len(stored.names):
                    whole = stored.module._replace(tensors=waiting.pop(module))
                    yield from self._in_our_format(stored, whole)
                    for tensor in whole.tensors.values():
                        done(tensor)

    def attached(
        self, tensors: Stream, attach: Callable[[str, PackedWeight], None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors; pass weights that the files have packed to `attach` instead.

        Calls `attach` with a weight's name once its last tensor has come.
        """
        yield from tensors

    def _in_our_format(self, stored: Stored, module: Module) -> Iterator[tuple[str, torch.Tensor]]:
        if any(tensor.is_meta for tensor in module.tensors.values()):  # a check by headers alone
            _check_alike(stored, module)
            shapes = stored.format.tensors(module.channels, module.columns).items()
            found = {n: without_data(s, dtype) for n, (s, dtype) in shapes}
        else:
            found = stored.scheme.read(module)
        if self.format_of(module.name) is None:
            found = {"weight": dequantise(found, stored.format)}
        for last, tensor in found.items():
            yield f"{module.name}.{last}", tensor


class ByFiles:
    """The part of both engines' quantisations that reads formats from a checkpoint's files."""

    formats: Formats

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [*PLAIN_DTYPES]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


def served_formats(quantisation: object) -> Formats | None:
    """The formats that a model loads; None: the engine's kernels take the tensors as they are."""
    return quantisation.formats if isinstance(quantisation, ByFiles) else None


def stored_formats(
    tensors: Stream,
    shapes: Shapes,
    holder: Callable[[str], str],
    quantization: Mapping[str, Any] | None,
    *,
    tower: str | None = None,
) -> Formats:
    """The formats of a checkpoint's modules.

    Args:
        tensors: those of the checkpoint, without data.
        shapes: of the weights before quantisation.
        holder: the name of our module that holds the checkpoint's.
        quantization: quantization_config of config.json, if it has one.
        tower: a quantised tensor of a vision tower, if one has any.

    Raises:
        CheckpointError: a module's format is unknown, or some of its tensors are missing.
    """
    shapes = matrices(shapes)
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        module, _, last = name.rpartition(".")
        if f"{module}.weight" in shapes and last not in NO_PART:
            found[module][last] = tensor
    less = less_of(quantization)
    stored = {}
    for name, parts in found.items():
        if parts.keys() == {"weight"} and parts["weight"].dtype in PLAIN_DTYPES:
            continue
        channels, columns = shapes[f"{name}.weight"]
        whole = Module(name, channels, columns, parts, less)
        known = _known(whole)
        form = known.format(whole)
        stored[name] = Stored(whole._replace(tensors={}), frozenset(parts), known, form)
    if not stored:
        raise CheckpointError(
            "quantization_config: config.json has one, and no tensor of the files is quantised; "
            "take both from one release, or remove it from config.json"
        )
    return Formats(stored, shapes, holder, tower=tower)


def less_of(quantization: Mapping[str, Any] | None) -> int:
    """What GPTQ subtracted from the stored zero points, according to quantization_config."""
    return 0 if (quantization or {}).get("checkpoint_format") == "gptq_v2" else 1


def without_wrapper(prefix: str) -> str:
    """A module's name in a text model; wrappers and drafters put more before it."""
    name = PREFIXED.search(prefix)
    return name[0] if name else prefix


def matrices(shapes: Shapes) -> Shapes:
    """Shapes of modules that may be quantised; n-gram tables are read separately."""
    return {
        name: shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not SHARD.search(name)
    }


def _known(module: Module) -> Scheme:
    known = scheme(module.tensors)
    names = module.tensors.keys()
    extra = sorted(names - {*known.needs, *known.may}) if known else []
    if known is None or extra:
        tensors = ", ".join(f"{name} {_dtype(module.tensors[name])}" for name in sorted(names))
        raise module.refuse(
            f"is quantised in a way that is not known here, with the tensors {tensors}",
            f"use a checkpoint in one of {KINDS}",
        )
    if missing := sorted(set(known.needs) - names):
        raise module.refuse(
            f"is quantised, and {', '.join(missing)} is missing",
            "download the checkpoint again, or check model.safetensors.index.json",
        )
    if "weight" in names and module.tensors["weight"].dtype != torch.uint8:
        module.check_weight()
    for name in names & set(SCALES):
        if module.tensors[name].dtype not in known.scales:
            what = f"{name} has the dtype {_dtype(module.tensors[name])}"
            fitting = " or ".join(map(_name, known.scales))
            raise module.refuse(what, f"use a checkpoint with scales in {fitting}")
    return known


def _check_alike(stored: Stored, module: Module) -> None:
    """Refuse a module that is stored differently from the weights at the server's start.

    Raises: CheckpointError, also for tensors that are in no known format.
    """
    at_load = stored.names == {"weight"}  # what the files have quantised has scales
    known = stored.scheme if at_load else _known(module)
    form = known.format(module)
    if known != stored.scheme or form != stored.format:
        raise module.refuse(
            f"is in {form.described()}, and what is served in {stored.format.described()}",
            "use weights that are quantised as those, or restart the server",
        )


def _dtype(tensor: torch.Tensor) -> str:
    return _name(tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(module: str) -> str:
    expert = EXPERT.match(module)
    return EXPERT_TENSORS[expert[2]] if expert else "weight"
