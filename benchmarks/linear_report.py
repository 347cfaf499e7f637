"""Tables and the picture of a benchmark of linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ptq4arvg.files import replacing

from .contenders import OUR_NAMES
from .linear_summary import Row, cells_of, geometric_mean
from .tables import number, plain_table

_COLUMNS = 3
_BITS = {"w8a8": 8, "w6a8": 6, "w6a6": 6}


def _contenders(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def machine_table(machine: Mapping[str, Any]) -> Table:
    """What the figures were measured on, and its limits."""
    table = plain_table("machine", ("", ""), ())
    table.show_header = False
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in machine["caches"].items())
    table.add_row("cpu", f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; {caches}")
    table.add_row("torch", machine["torch"])
    limits = machine["limits"]
    if limits is None:
        table.add_row("limits", "not measured: this package has no compiled CPU backend here")
        return table
    table.add_row("instruction set", limits["isa"])
    table.add_row("reading memory", f"{limits['read_gb_s']:.1f} GB/s")
    for kernel in OUR_NAMES:
        table.add_row(f"register loop {kernel}", f"{limits[f'{kernel}_gops']:.0f} GOPS")
    return table


def shape_table(title: str, rows: Sequence[Row]) -> Table:
    """Microseconds of every contender for every M of one shape, GOPS of ours, and the cores that other processes used
    meanwhile (``others``)."""
    names = _contenders(rows)
    ours = [name for name in names if name in OUR_NAMES]
    headers = ("M", *(f"{name} µs" for name in names), *(f"{name} GOPS" for name in ours), "others")
    table = plain_table(title, (), headers)
    for (_, _, m), cell in cells_of(rows).items():
        times = (number(cell[name]["seconds"] * 1e6, 1) if name in cell else "–" for name in names)
        rates = (number(cell[name]["gops"], 0) if name in cell else "–" for name in ours)
        busy = next(iter(cell.values()))["others"]
        table.add_row(str(m), *times, *rates, number(busy))
    return table


def ratio_table(kernel: str, ratios: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Time of every contender over that of one of our kernels, geometric mean over the shapes, per M."""
    table = plain_table(f"times slower than {kernel} (geometric mean over shapes)", (), ("M", *ratios))
    counts = list(next(iter(ratios.values()), {}))
    for m in counts:
        table.add_row(m, *(number(column[m]) for column in ratios.values()))
    return table


def summary_table(title: str, summary: Mapping[str, Any]) -> Table:
    """The key figures, one per line, with their values for every M where they have any."""
    counts = list(summary["by_rows"])
    table = plain_table(f"{title} (above 1 is in our favour; fractions are of the machine's limit)", ("figure",), ())
    table.add_column("all", justify="right")
    for m in counts:
        table.add_column(f"M={m}", justify="right", no_wrap=True)
    for name, value in summary.items():
        if not isinstance(value, float | None):
            continue
        base = name.rpartition("_m")[0]
        table.add_row(name, number(value, 3), *(number(summary["by_rows"][m].get(base)) for m in counts))
    return table


def monotone_table(result: Mapping[str, Any]) -> Table:
    """The largest drop of time from a smaller to a larger M, per kernel."""
    table = plain_table(
        f"largest t(M) / t(M') over M < M' at {result['shape']}, {len(result['rows'])} values of M",
        ("kernel",),
        ("ratio", "M", "M'"),
    )
    for kernel, worst in result["worst"].items():
        table.add_row(kernel, number(worst["ratio"], 3), str(worst["rows"][0]), str(worst["rows"][1]))
    return table


def plot(path: Path, rows: Sequence[Row], machine: Mapping[str, Any], monotone: Mapping[str, Any] | None) -> None:
    """Write a picture: operations per second over M, one panel per kind of layer; with the monotonicity run, its times.

    Dotted lines are the register loops, dashed ones what reading the weights alone would allow.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    panels = len(kinds) + (monotone is not None)
    lines = -(-panels // _COLUMNS)
    # Figure, not pyplot: no global state and no display needed.
    figure = Figure(figsize=(5 * min(panels, _COLUMNS), 4 * lines), layout="constrained")
    axes = figure.subplots(lines, min(panels, _COLUMNS), squeeze=False).flatten()
    for axis, kind in zip(axes, kinds, strict=False):
        _panel(axis, kind, [row for row in rows if row["kind"] == kind], machine["limits"])
    if monotone is not None:
        _monotone_panel(axes[panels - 1], monotone)
    for axis in axes[panels:]:
        axis.remove()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _panel(axis: Any, kind: str, rows: Sequence[Row], limits: Mapping[str, Any] | None) -> None:
    counts = sorted({row["M"] for row in rows})
    colours = {name: f"C{i}" for i, name in enumerate(_contenders(rows))}
    for name, colour in colours.items():
        mine = [row for row in rows if row["contender"] == name]
        rates = [geometric_mean(row["gops"] for row in mine if row["M"] == m) for m in counts]
        axis.plot(counts, rates, marker=".", color=colour, label=name, linewidth=2 if name in OUR_NAMES else 1)
    if limits is not None:
        for name, bits in _BITS.items():
            if name in colours:
                axis.axhline(limits[f"{name}_gops"], color=colours[name], linestyle=":", linewidth=1)
                memory = [2 * m * limits["read_gb_s"] * 8 / bits for m in counts]
                axis.plot(counts, memory, color=colours[name], linestyle="--", linewidth=0.8)
        top = 1.3 * max(limits[f"{name}_gops"] for name in OUR_NAMES)
        axis.set_ylim(min(row["gops"] for row in rows) / 1.3, top)
    shapes = dict.fromkeys(f"{row['N']}×{row['K']}" for row in rows)
    axis.set(xscale="log", yscale="log", xlabel="rows M", ylabel="GOPS", title=f"{kind}: {', '.join(shapes)}")
    axis.set_xticks(counts, [str(m) for m in counts], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.title.set_fontsize(8)
    axis.legend(fontsize=7)


def _monotone_panel(axis: Any, monotone: Mapping[str, Any]) -> None:
    for name, seconds in monotone["seconds"].items():
        axis.plot(monotone["rows"], [value * 1e6 for value in seconds], label=name, linewidth=1)
    axis.set(xlabel="rows M", ylabel="µs", title=f"every M, {monotone['shape']}")
    axis.legend(fontsize=7)
