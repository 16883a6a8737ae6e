"""`qwen3next plan`: memory of a model, a context length and a draft length, and what fits."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qwen3next_plugin import env
from qwen3next_plugin.config import (
    ConfigError,
    Qwen3NextConfig,
    check_num_draft_layers,
    check_num_speculative_tokens,
    host_rope,
    is_of_family,
    quantization_of,
    read_config,
    rope,
)
from qwen3next_plugin.engines.memory import mapped_bytes
from qwen3next_plugin.engines.plan import GIB, Flags, Plan, StateDtype, make_plan
from qwen3next_plugin.engines.sglang.pools import Pools
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.extras.command_line.machine import machine
from qwen3next_plugin.extras.command_line.plan_tables import (
    bound,
    by_default,
    print_formats,
    print_plan,
)
from qwen3next_plugin.extras.command_line.sizes import table_bytes, tensor_bytes
from qwen3next_plugin.model.checkpoint.sizes import parameters, part_of, served_dtype

ENGINES: Mapping[str, type[Blocks | Pools]] = {"vllm": Blocks, "sglang": Pools}
# Properties of each plan that --json has beside its fields.
DERIVED = ("concurrency", "fits", "kv_bytes_per_token", "spare", "state_bytes_per_slot")
DERIVED_OF_ENGINE: Mapping[type[Plan], tuple[str, ...]] = {
    Blocks: (
        *("group", "block_tokens", "block_bytes", "state_blocks", "kv_blocks_each"),
        *("blocks", "blocks_per_request"),
    ),
    Pools: ("slot_bytes", "slots_per_request", "slots", "tokens"),
}
AT_LOAD = env.VARIABLES["QWEN3NEXT_QUANTISE"].allowed


def plan(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder; config.json is enough.")],
    engine: Annotated[
        Literal["vllm", "sglang"], typer.Option(help="Whose memory layout; on a CPU.")
    ] = "vllm",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            *("--max-model-len", "--context"),
            min=1,
            help="Tokens of a request; by default the model's maximum, with YaRN the extended one.",
        ),
    ] = None,
    rope_scaling: Annotated[
        str | None, typer.Option(help="YaRN, as JSON; the same as the flag of vllm serve.")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Maximum number of concurrent requests.")
    ] = 16,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    num_speculative_tokens: Annotated[
        int | None, typer.Option(help="MTP draft length, 1 to 8; by default no drafts.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Activations, KV and weights; auto: the checkpoint's."),
    ] = "auto",
    quantise: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="As QWEN3NEXT_QUANTISE, which is the default."),
    ] = None,
    state_dtype: Annotated[
        StateDtype,
        typer.Option(help="The recurrent state; as --mamba-ssm-cache-dtype."),
    ] = "float32",
    prefix_caching: Annotated[bool, typer.Option(help="As the engine's own flag.")] = True,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1 << 20,
            help="GiB that one rank may use; by default its share of the machine's.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Print how much memory a model needs, and how many requests fit next to its weights."""
    env.check()
    raw = read_config(model)
    if rope_scaling and is_of_family(raw):
        raw = _extended(raw, host_rope.parse(rope_scaling, "--rope-scaling"))
    config = Qwen3NextConfig.from_hf(raw, tp_size=tp)
    if num_speculative_tokens is not None:
        check_num_speculative_tokens(num_speculative_tokens)
        check_num_draft_layers(config, "--num-speculative-tokens")
    here = machine()
    flags = Flags(
        max_model_len=_max_model_len(config, max_model_len),
        max_num_seqs=max_num_seqs,
        num_speculative_tokens=num_speculative_tokens or 0,
        dtype=served_dtype(raw) if dtype == "auto" else dtype,
        state_dtype=state_dtype,
        prefix_caching=prefix_caching,
        memory=int(memory * GIB) if memory is not None else here.memory_bytes // tp,
        threads=max(1, here.cores // tp),
        mapped=mapped_bytes(str(model)),
    )
    if (asked := quantise or env.quantise()) and quantization_of(model):
        flag = "--quantise " if quantise else "QWEN3NEXT_QUANTISE="
        raise ConfigError(f"{flag}{asked}: {model} is quantised already; leave it out")
    known = (None,) if quantization_of(model) else (None, *AT_LOAD)
    formats = {each: _planned(model, engine, config, flags, each) for each in known}
    result, source = formats.get(asked) or _planned(model, engine, config, flags, asked)
    named = {f"QWEN3NEXT_QUANTISE={f}" if f else "as stored": p for f, (p, _) in formats.items()}
    counts = parameters(config)
    mtp = sum(n for name, n in counts.items() if part_of(name) == "MTP")
    facts = {
        "weights_from": source,
        "parameters": sum(counts.values()) - mtp,
        "parameters_mtp": mtp,
        "ngram_table_in_files": table_bytes(model, config, flags.dtype),
    }
    if as_json:
        summary = {name: _summary(each) for name, each in named.items()}
        typer.echo(json.dumps(facts | _as_dict(result) | {"formats": summary}, indent=2))
    else:
        print_plan(model, config, result, facts)
        print_formats(named)
    if not result.concurrency:
        raise typer.Exit(1)


def _planned(
    model: Path, engine: str, config: Qwen3NextConfig, flags: Flags, asked: str | None
) -> tuple[Blocks | Pools, str]:
    """The plan, and where the weights' bytes come from."""
    sizes, source = tensor_bytes(model, config, flags.dtype, asked)
    if flags.num_speculative_tokens:
        _check_mtp(sizes)
    return make_plan(ENGINES[engine], config, sizes, flags), source


def _extended(raw: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its RoPE overridden by `given`."""
    text = raw.get("text_config") or raw
    text = text | {"rope_parameters": host_rope.merge(text, given, resized=False)}
    text |= dict.fromkeys(("rope_scaling", *rope.OF_ROPE))  # all in rope_parameters now
    return raw | {"text_config": text} if raw.get("text_config") else text


def _max_model_len(config: Qwen3NextConfig, asked: int | None) -> int:
    if asked is not None:
        rope.check_length(
            *(config.rope_parameters, config.max_position_embeddings, asked),
            *("--max-model-len", "--rope-scaling '%s'"),
        )
    return asked or config.max_length


def _check_mtp(sizes: Mapping[str, int]) -> None:
    if not any(part_of(name) == "MTP" for name in sizes):
        raise ConfigError(
            "the checkpoint has no mtp.* tensors: leave --num-speculative-tokens out, or fetch a"
            " checkpoint that kept its MTP layer"
        )


def _as_dict(p: Plan) -> dict[str, Any]:
    names = (*DERIVED, *DERIVED_OF_ENGINE[type(p)])
    derived = {"bound": bound(p)} | {name: getattr(p, name) for name in names}
    default = by_default(p)
    summary = {"pools": default.spare, "concurrency": default.concurrency}
    return asdict(p) | derived | {"by_default": summary}


def _summary(p: Plan) -> dict[str, int]:
    return {"weights": sum(p.weights.values()), "concurrency": p.concurrency}
