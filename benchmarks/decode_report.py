"""Key figures, tables and the picture of a benchmark of whole images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.figure import Figure
from rich.table import Table

from ptq4arvg.files import replacing

from .contention import DISTURBED
from .tables import number, plain_table

Row: TypeAlias = Mapping[str, Any]

# What the figures should reach; memory should stay below.
GOALS = {
    "rar_l_w6a6_vs_fp32": 8.0,
    "rar_l_w8a8_vs_fp32": 6.0,
    "rar_l_w6a6_vs_dynamic_int8": 2.5,
    "rar_l_peak_memory_vs_fp32": 0.30,
}
_RATIOS = (("w6a6", "fp32"), ("w8a8", "fp32"), ("w6a6", "dynamic_int8"), ("w6a6", "compiled"))


def summarize(rows: Sequence[Row], allocations: Sequence[Row]) -> dict[str, Any]:
    """Key figures; None where a contender was not measured. Ratios of time are above 1 in our favour.

    ``estimated`` names the contenders of the ratios whose images were put together from single steps, and
    ``disturbed`` counts the rows that were measured while other processes ran.
    """
    cells = {(row["model"], row["batch"], row["contender"]): row for row in rows}

    def figure(model: str, batch: int, contender: str, name: str) -> float | None:
        value = cells.get((model, batch, contender), {}).get(name)
        return None if value is None else float(value)

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    summary: dict[str, Any] = {}
    for batch in sorted({row["batch"] for row in rows} | {1}):
        suffix = "" if batch == 1 else f"_batch{batch}"
        for ours, peer in _RATIOS:
            times = (figure("rar_l", batch, name, "seconds_per_image") for name in (peer, ours))
            summary[f"rar_l_{ours}_vs_{peer}{suffix}"] = ratio(*times)
    ours_mb, fp32_mb = (figure("rar_l", 1, name, "peak_memory_mb") for name in ("w6a6", "fp32"))
    summary["rar_l_peak_memory_vs_fp32"] = ratio(ours_mb, fp32_mb)
    decode = [figure("rar_l", 1, name, "decode_peak_mb") for name in ("w6a6", "fp32")]
    summary["rar_l_decode_memory_vs_fp32"] = ratio(*decode)
    for model in ("rar_b", "rar_l"):
        names = ("w6a6", "w8a8", "fp32")
        summary[f"{model}_tokens_per_s"] = {name: figure(model, 1, name, "tokens_per_s") for name in names}
    summary["allocations_per_step"] = max((row["allocations_per_step"] for row in allocations), default=None)
    summary["estimated"] = [f"{row['model']} {row['contender']} {row['batch']}" for row in rows if row["estimated"]]
    summary["disturbed"] = sum((row["others"] or 0) > DISTURBED for row in rows)
    return summary


def cell_table(model: str, batch: int, rows: Sequence[Row]) -> Table:
    """All contenders of one model and batch size. Times with ~ are put together from single steps; ``others`` are the
    cores that other processes used meanwhile."""
    headers = ("s/image", "tokens/s", "ms/step", "× fp32", "peak MB", "load MB", "decode MB", "first s", "others")
    table = plain_table(f"{model}, {batch} image{'s' * (batch > 1)} at once", ("contender",), headers)
    fp32 = next((row["seconds_per_image"] for row in rows if row["contender"] == "fp32"), None)
    for row in rows:
        seconds = row["seconds_per_image"]
        table.add_row(
            row["contender"],
            f"{'~' if row['estimated'] else ''}{seconds:.3f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['step_ms']:.2f}",
            number(None if fp32 is None else fp32 / seconds),
            *(number(row[name], 0) for name in ("peak_memory_mb", "load_peak_mb", "decode_peak_mb")),
            number(row["warm_up_s"], 1),
            number(row["others"]),
        )
    return table


def allocation_table(rows: Sequence[Row]) -> Table:
    table = plain_table(
        "memory allocated per decode step after warm-up", ("model", "contender"), ("batch", "allocations", "net bytes")
    )
    for row in rows:
        numbers = (row["batch"], f"{row['allocations_per_step']:g}", f"{row['net_bytes_per_step']:g}")
        table.add_row(row["model"], row["contender"], *(str(count) for count in numbers))
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The key figures beside what they should reach."""
    table = plain_table("summary", ("figure",), ("value", "goal", ""))
    for name, value in summary.items():
        if isinstance(value, dict):
            for part, figure in value.items():
                table.add_row(f"{name} {part}", number(figure, 1), "", "")
        elif isinstance(value, float | None):
            goal, verdict, sign = GOALS.get(name), "", "≥"
            if goal is not None:
                below = "memory" in name
                sign = "≤" if below else "≥"
                if value is not None:
                    verdict = "reached" if (value <= goal if below else value >= goal) else "missed"
                    if summary["disturbed"] and not below:
                        verdict = "unknown: disturbed"
            table.add_row(name, number(value), "" if goal is None else f"{sign} {goal:g}", verdict)
    return table


def machine_line(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Write a picture: tokens per second and peak memory of every contender, one column per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    # Figure, not pyplot: no global state and no display needed.
    figure = Figure(figsize=(4.5 * max(1, len(models)), 7), layout="constrained")
    axes = figure.subplots(2, max(1, len(models)), squeeze=False)
    units = (("tokens_per_s", "tokens/s"), ("peak_memory_mb", "peak memory above imports, MB"))
    for column, model in enumerate(models):
        names = list(dict.fromkeys(row["contender"] for row in rows if row["model"] == model))
        for line, (key, label) in enumerate(units):
            axis = axes[line, column]
            for i, batch in enumerate(batches):
                found = {row["contender"]: row[key] for row in rows if (row["model"], row["batch"]) == (model, batch)}
                heights = [found.get(name) or 0.0 for name in names]
                places = [x + 0.8 * (i + 0.5) / len(batches) - 0.4 for x in range(len(names))]
                axis.bar(places, heights, 0.8 / len(batches), label=f"batch {batch}")
            axis.set_xticks(range(len(names)), names, fontsize=8)
            axis.set(title=model, ylabel=label)
            axis.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
