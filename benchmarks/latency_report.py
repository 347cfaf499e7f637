"""Tables and the picture of the GPU benchmark of layers, steps and images, measured or predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ptq4arvg.files import replacing

from .gpu_devices import Gpu
from .linear_summary import geometric_mean
from .tables import number, plain_table

Row = Mapping[str, Any]


def _contenders(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def layer_table(title: str, rows: Sequence[Row]) -> Table:
    """Measured: microseconds, GB/s, TOPS and fraction of the roofline of every contender for every M of a shape."""
    right = ("µs", "GB/s", "TOPS", "of roofline", "× fp16", "copies")
    table = plain_table(title, ("M", "contender"), right)
    for row in sorted(rows, key=lambda row: row["M"]):
        ratio = next((value for key, value in row.items() if key.startswith("over_")), None)
        table.add_row(
            str(row["M"]),
            row["contender"],
            number(row["seconds"] * 1e6, 1),
            number(row["gb_s"], 0),
            number(row["tops"], 1),
            number(row["roofline_fraction"]),
            number(ratio),
            str(row["copies"]),
        )
    return table


def ratio_table(rows: Sequence[Row], baseline: str) -> Table:
    """Times faster than the baseline, geometric mean over the shapes, per M."""
    counts = sorted({row["M"] for row in rows})
    table = plain_table(
        f"times faster than {baseline} (geometric mean over shapes)", ("contender",), [f"M={m}" for m in counts]
    )
    for name in _contenders(rows):
        means = [
            geometric_mean(row[f"over_{baseline}"] for row in rows if row["contender"] == name and row["M"] == m)
            for m in counts
        ]
        table.add_row(name, *(number(mean) for mean in means))
    return table


def step_table(rows: Sequence[Row], baseline: str) -> Table:
    """Measured: a decode step and an image of every contender of a model."""
    title = f"{rows[0]['model']}, random weights"
    table = plain_table(title, ("contender",), ("images", "step ms", f"× {baseline}", "s/image", "tokens/s"))
    for row in rows:
        table.add_row(
            row["contender"],
            str(row["images"]),
            number(row["step_seconds"] * 1e3, 3),
            number(row[f"over_{baseline}"]),
            number(row["image_seconds"], 3),
            number(row["tokens_per_s"], 0),
        )
    return table


def prediction_table(device: Gpu, layers: Sequence[Row], steps: Sequence[Row]) -> Table:
    """Predicted lower bounds for a GPU: layers by kind and M, then decode steps of whole models."""
    limits = f"{device.memory_gb_s:g} GB/s, {device.int8_tops:g} int8 TOPS, {device.multiprocessors} SMs"
    title = f"PREDICTION for {device.name} ({limits} at {device.clock_ghz:g} GHz; {device.source}); not timed"
    right = ("M", "launches", "≥ µs", "≤ GB/s", "≤ TOPS", "fp16 ≥ µs", "fp16 / ours", "image ≥ s")
    table = plain_table(title, ("what", "contender", "limit"), right)
    for row in layers:
        table.add_row(
            f"{row['layers'][0]} {row['N']}x{row['K']}",
            row["contender"],
            row["limit"],
            str(row["M"]),
            str(row["launches"]),
            number(row["seconds"] * 1e6),
            number(row["gb_s"], 0),
            number(row["tops"], 1),
            number(row["fp16_seconds"] * 1e6),
            number(row["over_fp16"]),
            "",
        )
    for row in steps:
        table.add_row(
            f"{row['model']} step",
            row["contender"],
            "",
            str(row["sequences"]),
            str(row["launches"]),
            number(row["seconds"] * 1e6, 0),
            number(row["bytes"] / row["seconds"] / 1e9, 0),
            number(2 * row["macs"] / row["seconds"] / 1e12, 1),
            number(row["fp16_seconds"] * 1e6, 0),
            number(row["over_fp16"]),
            number(row["image_seconds"], 3),
        )
    return table


def plot(path: Path, report: Mapping[str, Any]) -> None:
    """Write a picture: times faster than fp16 over M, one panel per device; predictions say so in their titles."""
    rows = report["rows"] or report["steps"]
    over = next(key for key in rows[0] if key.startswith("over_"))
    machine = report.get("machine", {}).get("device", "")
    devices = list(dict.fromkeys(row.get("gpu", machine) for row in rows))
    figure = Figure(figsize=(4.5 * len(devices), 4), layout="constrained")
    axes = figure.subplots(1, len(devices), squeeze=False)[0]
    for axis, device in zip(axes, devices, strict=True):
        mine = [row for row in rows if row.get("gpu", machine) == device]
        count = "M" if "M" in mine[0] else "sequences"
        counts = sorted({row[count] for row in mine})
        for name in _contenders(mine):
            means = [
                geometric_mean(row[over] for row in mine if row["contender"] == name and row[count] == m)
                for m in counts
            ]
            axis.plot(counts, means, marker=".", label=name)
        label = "" if report["timed"] else "prediction, not timed: "
        axis.set(xscale="log", xlabel=f"rows {count}", ylabel="times faster than fp16", title=f"{label}{device}")
        axis.set_xticks(counts, [str(m) for m in counts], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.title.set_fontsize(9)
        axis.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
