"""Turn what was measured of MTP into the figures of docs/mtp.md and its pictures."""

from benchmarks.report import BEGIN, DOCS, END, Table, chart, host, markdown

COLOURS = {"off": "#555555", "adaptive": "#c44e52"}  # of the policies; fixed ones are shades
SHADES = ("#b8cbe3", "#8faed3", "#6690c3", "#3d72b3")


def write(results: dict) -> None:
    """Write both pictures, and the page's part between its marks."""
    page = DOCS / "mtp.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(before + BEGIN + part(results) + END + after)
    if "clients" in results:
        clients_picture(results["clients"])
    if "steps" in results:
        steps_picture(results["steps"])


def part(results: dict) -> str:
    """Tables and pictures, in Markdown."""
    parts = [f"{host(results)}.\n"]
    if "clients" in results:
        table = results["clients"]
        parts += [
            "**The shipped checkpoint**, `vllm serve`, bf16, greedy, each client one request after "
            "the other; medians of rounds in which the policies take turns.\n",
            "![tokens per second against clients, a line for each policy](mtp-clients.svg)\n",
            markdown(columns(table, ", tok/s")),
            markdown(columns(table, " over off")),
            markdown({k: v for k, v in table.items() if "client" not in k}),
        ]
    if "steps" in results:
        parts += [
            "**The block model**, random weights, so that hardly a draft is accepted; eager, the "
            "shortest of all rounds' steps, drafting included. In plain steps of the same side:\n",
            "![verify steps in plain steps, with floors](mtp-steps.svg)\n",
            markdown(results["steps"]),
        ]
    return "\n".join(parts)


def columns(table: Table, ending: str) -> Table:
    """The columns with this ending, without it, of the rows that have any."""
    found = {
        name: {k.removesuffix(ending): v for k, v in row.items() if k.endswith(ending)}
        for name, row in table.items()
    }
    return {f"{name}{ending}": row for name, row in found.items() if row}


def clients_picture(table: Table) -> None:
    """Tokens per second against clients, a line for each policy."""
    rates = {int(k.split()[0]): row for k, row in columns(table, ", tok/s").items()}
    policies = list(next(iter(rates.values())))
    shades = iter(SHADES)
    with chart(DOCS / "mtp-clients.svg", (6.5, 4)) as axes:
        for policy in policies:
            colour = COLOURS.get(policy) or next(shades)
            width = 2.5 if policy in COLOURS else 1.2
            values = [row[policy] for row in rates.values()]
            axes.plot(list(rates), values, "o-", color=colour, linewidth=width, label=policy)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(rates), [str(clients) for clients in rates])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients at once")
        axes.set_ylabel("tokens per second")
        axes.legend(frameon=False)


def steps_picture(table: Table) -> None:
    """Verify steps in plain steps: both sides, what was to be reached, and the floor by bytes."""
    rows = {name: row for name, row in table.items() if "floor" in row}
    labels = [name.removeprefix("verify step over plain, ") for name in rows]
    with chart(DOCS / "mtp-steps.svg", (7.5, 4)) as axes:
        for offset, side, colour in ((-0.2, "upstream", "#bbbbbb"), (0.2, "plugin", "#4c72b0")):
            places = [i + offset for i in range(len(rows))]
            values = [row[side] for row in rows.values()]
            bars = axes.bar(places, values, 0.38, color=colour, label=side)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        for key, style in (("to reach", "-"), ("floor", ":")):
            for i, row in enumerate(rows.values()):
                label = key if i == 0 else None
                axes.hlines(row[key], i - 0.42, i + 0.42, "#c44e52", style, label=label)
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
        axes.set_ylabel("plain steps")
        axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.15))
