"""The rows of a result between GPUs, their table and their plot."""

import pathlib
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.group import LOOPS
from benchmarks.limits import LIMITED
from benchmarks.shapes import GroupShape

Row = dict[str, Any]

OURS = ("", *LOOPS)  # forms


def result_name(benchmark: str, num_ranks: int) -> str:
    """Of two ranks that of the benchmark, which says how many others are: ep-4, ep-4-processes."""
    parts = [benchmark, str(num_ranks) * (num_ranks != 2), "processes" * (jax.process_count() > 1)]
    return "-".join(filter(None, parts))


def make_row(shape: GroupShape, op: str, form: str, us: float, limit: dict[str, float]) -> Row:
    """ratio: to M. GB/s, where bytes cross, of those alone and with those of own tokens."""
    row = {**vars(shape), "C": shape.num_rows, "op": op, "form": form, "us": us, **limit}
    if "M_us" in limit:
        row["ratio"] = us / limit["M_us"]
    for which in ("remote", "routed"):
        if f"{which}_bytes" in limit:
            row[f"{which}_GBps"] = limit[f"{which}_bytes"] / us * 1e-3
    return row


def label(shape: GroupShape) -> str:
    """What tells a point from the standard one."""
    standard = vars(GroupShape(R=shape.R))
    changed = [f"{key}={value}" for key, value in vars(shape).items() if value != standard[key]]
    return ", ".join(changed) or "standard"


def best_stock(rows: list[Row], row: Row) -> Row | None:
    """The fastest stock form of a row's op at its point."""
    point = {key: row[key] for key in (*vars(GroupShape()), "op")}
    forms = [r for r in rows if r["form"] not in OURS and point.items() <= r.items()]
    return min(forms, key=lambda r: r["us"], default=None)


def show(rows: list[Row], console: Console) -> None:
    """Each of our rows, with the fastest stock form beside it."""
    letters = ("T", "H", "K", "A", "tail", "C", "num_sms", "routing")
    limits = ("remote MB", "local MB", "P us", "M us", "us/P", "us/M")
    rates = ("GB/s remote", "with own")
    table = Table(*letters[:-2], "SMs", "routing", "op", "us", *limits, *rates, "stock us")
    for r in [r for r in rows if r["form"] in OURS]:
        best = None if r["form"] else best_stock(rows, r)
        table.add_row(
            *["-" if r[letter] is None else str(r[letter]) for letter in letters],
            f"{r['op']} {r['form']}".strip(),
            f"{r['us']:.1f}",
            *[
                f"{r[key] / 1e6:.1f}" if key in r else "-"
                for key in ("remote_bytes", "local_bytes")
            ],
            *[f"{r[key]:.1f}" if key in r else "-" for key in ("P_us", "M_us")],
            *[f"{r['us'] / r[key]:.2f}" if key in r else "-" for key in ("P_us", "M_us")],
            *[f"{r[key]:.0f}" if key in r else "-" for key in ("remote_GBps", "routed_GBps")],
            f"{best['us']:.1f}" if best else "-",
        )
    if rows:
        console.print(table)


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Time against T at the standard point, with P and M and the fastest stock form."""
    import matplotlib as mpl  # not needed with --quick

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    num_ranks = rows[0]["R"]
    standard = {key: value for key, value in vars(GroupShape(R=num_ranks)).items() if key != "T"}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")

    def draw(points: list[Row], key: str, style: str, **options: Any) -> None:
        known = [r for r in points if key in r]
        if known:
            axes.loglog([r["T"] for r in known], [r[key] for r in known], style, **options)

    for index, op in enumerate(LIMITED):
        wanted = {**standard, "op": op, "form": ""}
        points = sorted((r for r in rows if wanted.items() <= r.items()), key=lambda r: r["T"])
        others = [other for r in points if (other := best_stock(rows, r))]
        draw(points, "us", "o-", color=f"C{index}", label=op)
        draw(points, "M_us", ":", color=f"C{index}", label=f"M of {op}")
        draw(others, "us", "x-", color=f"C{index}", linewidth=0.7, label=f"stock JAX's {op}")
        if op == LIMITED[0]:
            draw(points, "P_us", "k--", label="P")
    title = f"R = {num_ranks}, H = 7168, K = 8, A = 128, bf16"
    axes.set(xlabel="tokens T a rank", ylabel="µs", title=title)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
