"""Write the model card from measured files, so that no number is typed by hand: see --help."""

import json
import statistics
from pathlib import Path
from typing import Annotated

import typer

from .corpus import HELD_OUT_PERCENT
from .export import WEIGHTS
from .figures import TASKS, read_log

SHAPE = {
    "hidden, vocabulary": "{hidden_size}, {vocab_size}",
    "layers": "{linear} linear, {full} full attention, {num_nextn_predict_layers} MTP",
    "linear attention, key heads": "{linear_num_key_heads} of {linear_key_head_dim}",
    "linear attention, value heads": "{linear_num_value_heads} of {linear_value_head_dim}",
    "full attention": "{num_attention_heads} heads of {head_dim}, {num_key_value_heads} key-value",
    "experts": "{num_experts_per_tok} of {num_experts}, each {moe_intermediate_size} wide",
    "shared expert": "{shared_expert_intermediate_size} wide, gated",
}
TEMPLATE = Path(__file__).with_name("card_template.md")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column left, the others right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def shape_table(config: dict) -> str:
    """The model's sizes."""
    types = config["layer_types"]
    sizes = config | {
        "linear": types.count("linear_attention"),
        "full": types.count("full_attention"),
    }
    rows = [[name, text.format(**sizes)] for name, text in SHAPE.items()]
    return table(["", ""], rows)


def perplexity_table(perplexity: dict) -> str:
    """A row for each kind of text."""
    rows = [
        [kind, f"{p['tokens']:,}", f"{p['perplexity']:.2f}", f"{p['bits_per_byte']:.3f}"]
        for kind, p in perplexity.items()
    ]
    return table(["held-out", "tokens", "perplexity", "bits per byte"], rows)


def acceptance_table(acceptance: dict) -> str:
    """Acceptance by position, and tokens a step."""
    rows = []
    for task, label in TASKS.items():
        a = acceptance[task]
        rates = [f"{rate:.2f}" for rate in a["given_previous"]]
        rows.append([label, f"{a['drafts']:,}", *rates, f"{a['tokens_per_step']:.2f}"])
    head = ["", "drafts", "position 1", "2, given 1", "3, given 2", "tokens a step"]
    return table(head, rows)


def largest_share(layers: list[list[float]]) -> float:
    """The busiest expert's share, averaged over layers."""
    return statistics.mean(max(shares) for shares in layers)


def apart(experts: dict) -> float:
    """Total variation between expert shares of source text and chat, averaged over layers."""
    pairs = zip(experts["source"], experts["chat"], strict=True)
    return statistics.mean(sum(abs(a - b) for a, b in zip(s, c, strict=True)) / 2 for s, c in pairs)


def ablation_table(ablations: dict) -> str:
    """A row for each variant."""
    rows = [
        [
            name,
            f"{a['lm']:.3f}",
            f"{largest_share(a['experts']['source']):.1%}",
            f"{apart(a['experts']):.1%}",
            f"{a['norm_weights']['rms']:.4f}",
            f"{a['norm_weights']['max']:.3f}",
        ]
        for name, a in ablations.items()
    ]
    head = ["", "loss, last 20 steps", "largest share", "apart", "norm weights' rms", "largest"]
    return table(head, rows)


def sample_list(samples: list[dict]) -> str:
    """Greedy answers to held-out questions, unselected."""
    quote = "> **{question}**\n>\n> ```text\n{answer}\n> ```\n"
    parts = []
    for s in samples:
        answer = "\n".join(f"> {line}" for line in s["answer"].replace("```", "'''").splitlines())
        parts.append(quote.format(question=" ".join(s["question"].split()), answer=answer))
    return "\n".join(parts)


def run_figures(log: list[dict], setup: dict) -> dict:
    """Totals and speed of the whole run, from the log."""
    last = log[-1]
    return {
        "tokens": last["tokens"],
        "steps": last["step"],
        "batch": last["tokens"] // last["step"],
        "minutes": last["seconds"] / 60,
        "epochs": last["tokens"] / setup["data"]["tokens"],
        "speed": last["tokens"] / last["seconds"],
    }


def learning_rates(log: list[dict]) -> float:
    """The sum over all steps."""
    steps = [0, *(record["step"] for record in log)]
    return sum(r["lr"] * (r["step"] - before) for r, before in zip(log, steps, strict=False))


def tools_table(tools: dict) -> str:
    """A row for each mode."""
    rows = [
        [mode, f"{m['dialogues']}", f"{m['called']:.0%}", f"{m['answered']:.0%}"]
        for mode, m in tools.items()
    ]
    return table(["", "dialogues", "right call", "and right answer"], rows)


def card(folder: Path) -> str:
    """The whole card."""
    names = ("config", "measured", "ablations", "train_setup", "continued_setup")
    config, m, ablations, setup, continued = (
        json.loads((folder / f"{n}.json").read_text()) for n in names
    )
    acceptance, short, log = m["acceptance"], ablations["recipe"], read_log(folder)
    return TEMPLATE.read_text().format(
        **run_figures(log, setup),
        **{f"then_{n}": v for n, v in run_figures(read_log(folder, "continued"), setup).items()},
        then_share=continued["tools"],
        then_rate=continued["learning_rate"],
        then_note=continued.get("note", ""),
        tools=tools_table(m["tools"]),
        parameters=f"{m['parameters']['trunk'] / 1e6:.1f} + {m['parameters']['mtp'] / 1e6:.1f}",
        megabytes=(folder / WEIGHTS).stat().st_size / 1e6,
        cpu=m["cpu_capability"],
        threads=setup["threads"],
        shape=shape_table(config),
        training=m["documents"]["training"],
        held_out=m["documents"]["held_out"],
        corpus=setup["data"]["tokens"],
        percent=HELD_OUT_PERCENT,
        vocab=config["vocab_size"],
        depths=setup["mtp_depths"],
        mtp_weight=setup["mtp_weight"],
        deep_every=setup["deep_every"],
        note=setup.get("note", ""),  # a remark about the run, written by hand
        rate=setup["learning_rate"],
        decay=setup["weight_decay"],
        clip=setup["clip"],
        perplexity=perplexity_table(m["perplexity"]),
        acceptance=acceptance_table(acceptance),
        distinct_text=acceptance["generated_text"]["distinct_4_grams"],
        distinct_chat=acceptance["generated_chat"]["distinct_4_grams"],
        ablation_steps=short["steps"],
        shrink=setup["learning_rate"] * setup["weight_decay"] * short["steps"],
        main_shrink=setup["weight_decay"] * learning_rates(log),
        ablation_batch=short["tokens"] // short["steps"],
        ablations=ablation_table(ablations),
        even=1 / config["num_experts"],
        main_share=largest_share(m["experts"]["source"]),
        main_apart=apart(m["experts"]),
        main_rms=m["norm_weights"]["rms"],
        main_max=m["norm_weights"]["max"],
        samples=sample_list(m["samples"]),
    )


def main(checkpoint: Annotated[Path, typer.Option(help="The checkpoint's folder.")]) -> None:
    """Write README.md from the configs, logs and measurements in the checkpoint's folder."""
    (checkpoint / "README.md").write_text(card(checkpoint))


if __name__ == "__main__":
    typer.run(main)
