"""Tables of docs/cuda.md that docs/triton.md has not."""

from __future__ import annotations

from collections.abc import Sequence

from .tables import Row, grouped, markdown, span


def _area(group: tuple[int, bool, str]) -> tuple[int, bool, list[int]]:
    bits, norm, tile = group
    return -bits, norm, [int(size) for size in tile.split()[0].split("x")]


def cuda_loops(rows: Sequence[Row]) -> str:
    """Main loop per step and warp, by tile and architecture, over all outputs; beside its floor."""
    gemms = [row for row in rows if "sass" in row]
    archs = sorted({row["arch"] for row in gemms})
    lines = []
    by_tile = grouped(gemms, lambda row: (row["w_bits"], row["norm"], row["tile"]))
    for bits, norm, tile in sorted(by_tile, key=_area):
        mine = by_tile[bits, norm, tile]
        of_arch = {arch: [row for row in mine if row["arch"] == arch] for arch in archs}
        loops = [span(round(row["sass_per_iteration"], 1) for row in found) or "–" for found in of_arch.values()]
        first = of_arch[archs[0]] or mine
        lines.append(
            [
                f"W{bits} {tile}{' norm' if norm else ''}",
                *loops,
                span(round(row["sass_per_kmac"], 2) for row in first),
                f"{mine[0]['floor_per_kmac']:.2f}",
                f"{min(row['over_floor'] for row in mine):.2f}–{max(row['over_floor'] for row in mine):.2f}",
                span(row["registers"] for row in mine),
                str(max(row["spill_bytes"] for row in mine)),
                span(size for row in mine for size in (row["least_shared_bytes"], row["shared_bytes"])),
            ]
        )
    headers = ["tile", *(f"sm_{arch}" for arch in archs), "per 1000 MAC", "floor", "over floor"]
    return markdown([*headers, "registers", "spill B", "shared B"], lines)


def fewer(ours: float, other: float) -> str:
    return f"{100 * (1 - ours / other):.0f} %"


def linears(rows: Sequence[Row]) -> str:
    """Single products beside Triton's: bytes, wavefronts, instructions in all and of the main loop."""
    single = [row for row in rows if row["part"] == "linears"]
    other = {(row["recipe"], row["rows"]): row for row in single if row["backend"] == "triton"}
    lines = []
    for row in (row for row in single if row["backend"] == "cuda"):
        theirs = other.get((row["recipe"], row["rows"]))
        cells = [row["recipe"], str(row["M"]), row["tile"] + (f" /{row['split']}" if row["split"] > 1 else "")]
        cells += [f"{row['ratio']:.3f}", f"{row['sector_efficiency']:.3f}", f"{row['loop_bank_factor'] or 1:.3f}"]
        for name in ("instructions_per_kmac", "loop_sass_per_kmac"):
            cells.append(f"{row[name]:.2f}")
            cells += ["", ""] if theirs is None else [f"{theirs[name]:.2f}", fewer(row[name], theirs[name])]
        lines.append(cells)
    headers = ["", "M", "tile", "asked / least", "sector efficiency", "wavefronts / ideal"]
    headers += ["PTX per 1000 MAC", "Triton", "fewer", "loop SASS per 1000 MAC", "Triton", "fewer"]
    return markdown(headers, lines)
