"""Key figures of a benchmark of linear layers, computed from its rows alone. Ratios above 1 are in our favour."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from .contenders import OUR_NAMES
from .contention import DISTURBED

Row: TypeAlias = Mapping[str, Any]
Cell: TypeAlias = Mapping[str, Row]
"""The rows of one shape and number of rows M, by contender."""

# The libraries whose best time is the yardstick; torch's oneDNN engine joins them in the figures named "any".
BEST_INT8: tuple[str, ...] = ("fbgemm", "onnxruntime", "openvino")
ANY_INT8: tuple[str, ...] = (*BEST_INT8, "onednn")

FEW_ROWS = 2
SOME_ROWS = 16
MANY_ROWS = 64


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of the values that are there, None if none is."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(statistics.fmean(logs)) if logs else None


def time_ratio(other: Row, ours: Row) -> float:
    """How many times longer ``other`` takes: the ratio of every round, then the median, so that a slow spell of the
    machine counts on both sides."""
    pairs = zip(other["round_seconds"], ours["round_seconds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def cells_of(rows: Sequence[Row]) -> dict[tuple[int, int, int], dict[str, Row]]:
    """Rows grouped by (N, K, M), then by contender."""
    cells: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["N"], row["K"], row["M"]), {})[row["contender"]] = row
    return cells


def against(cell: Cell, kernel: str, others: Sequence[str]) -> float | None:
    """Ratio of the fastest of ``others`` to our kernel; None where either is missing."""
    present = [cell[name] for name in others if name in cell]
    if kernel not in cell or not present:
        return None
    return time_ratio(min(present, key=lambda row: row["seconds"]), cell[kernel])


def bandwidth_fraction(cell: Cell, kernel: str, limits: Mapping[str, Any] | None) -> float | None:
    """Packed weight bytes per second over what memory delivers."""
    if kernel not in cell or limits is None:
        return None
    return float(cell[kernel]["weight_gb_s"] / limits["read_gb_s"])


def ceiling_fraction(cell: Cell, kernel: str, limits: Mapping[str, Any] | None) -> float | None:
    """Operations per second over those of the bare register loop."""
    if kernel not in cell or limits is None:
        return None
    return float(cell[kernel]["gops"] / limits[f"{kernel}_gops"])


def disturbed(cell: Cell) -> bool:
    """Whether other processes took enough of the machine to make the figures of a cell doubtful."""
    return any((row.get("others") or 0.0) > DISTURBED for row in cell.values())


def summarize(rows: Sequence[Row], limits: Mapping[str, Any] | None) -> dict[str, Any]:
    """Geometric means over shapes and row counts; a figure whose contenders or limits are missing is None.

    ``*_m16plus``, ``*_m64plus``: over cells with at least so many rows; ``*_m2``: over those with at most two.
    ``disturbed_cells`` of ``cells`` were measured while other processes ran; they are in the means all the same.
    ``by_rows`` has the same figures for every M, ``ratios`` those of every kernel to every contender and M.
    """
    measures: dict[str, Callable[[Cell], float | None]] = {
        "w8a8_vs_best_int8": lambda cell: against(cell, "w8a8", BEST_INT8),
        "w6a6_vs_best_int8": lambda cell: against(cell, "w6a6", BEST_INT8),
        "w8a8_vs_any_int8": lambda cell: against(cell, "w8a8", ANY_INT8),
        "w6a6_vs_any_int8": lambda cell: against(cell, "w6a6", ANY_INT8),
        "w6a6_vs_w8a8": lambda cell: against(cell, "w6a6", ("w8a8",)),
        "w6a6_bandwidth_fraction": lambda cell: bandwidth_fraction(cell, "w6a6", limits),
        "w8a8_bandwidth_fraction": lambda cell: bandwidth_fraction(cell, "w8a8", limits),
        "w8a8_ceiling_fraction": lambda cell: ceiling_fraction(cell, "w8a8", limits),
        "w6a6_ceiling_fraction": lambda cell: ceiling_fraction(cell, "w6a6", limits),
    }
    cells = cells_of(rows)
    counts = sorted({m for _, _, m in cells})

    def mean(measure: Callable[[Cell], float | None], low: int, high: float = math.inf) -> float | None:
        return geometric_mean(measure(cell) for (_, _, m), cell in cells.items() if low <= m <= high)

    summary: dict[str, Any] = {}
    for name in ("w8a8_vs_best_int8", "w6a6_vs_best_int8", "w8a8_vs_any_int8", "w6a6_vs_any_int8"):
        summary[f"{name}_m16plus"] = mean(measures[name], SOME_ROWS)
    for name in ("w6a6_bandwidth_fraction", "w8a8_bandwidth_fraction", "w6a6_vs_w8a8"):
        summary[f"{name}_m2"] = mean(measures[name], 1, FEW_ROWS)
    for name in ("w8a8_ceiling_fraction", "w6a6_ceiling_fraction"):
        summary[f"{name}_m64plus"] = mean(measures[name], MANY_ROWS)
    summary["cells"] = len(cells)
    summary["disturbed_cells"] = sum(disturbed(cell) for cell in cells.values())
    summary["by_rows"] = {str(m): {name: mean(measure, m, m) for name, measure in measures.items()} for m in counts}
    summary["ratios"] = {
        kernel: {
            other: {
                str(m): geometric_mean(against(cell, kernel, (other,)) for (_, _, n), cell in cells.items() if n == m)
                for m in counts
            }
            for other in dict.fromkeys(row["contender"] for row in rows)
            if other != kernel
        }
        for kernel in OUR_NAMES
        if any(row["contender"] == kernel for row in rows)
    }
    return summary
