r"""The tables of docs/triton.md and docs/cuda.md from reports of ``benchmarks.resources``, ``traffic``, ``latency``.

    python -m benchmarks.gpu_markdown docs/resources.json out/traffic.json out/latency.json --into docs/triton.md
    python -m benchmarks.gpu_markdown --backend cuda docs/resources.json out/traffic_cuda.json out/latency_cuda.json \
        --into docs/cuda.md

A table stands between ``<!-- name -->`` and ``<!-- end -->``; everything else of the document stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ptq4arvg.files import replacing

from .cuda_markdown import cuda_loops, linears
from .tables import grouped, markdown, span

Row = Mapping[str, Any]


def _area(group: tuple[str, int]) -> tuple[int, list[int]]:
    tile, bits = group
    return -bits, [int(size) for size in tile.split()[0].split("x")]


def gemm_loops(rows: Sequence[Row]) -> str:
    """Main loop per K tile and warp, by tile and architecture; over all epilogues, even and ragged."""
    gemms = [row for row in rows if "sass" in row]
    archs = sorted({row["arch"] for row in gemms})
    groups = grouped(gemms, lambda row: (row["tile"], row["w_bits"]))
    lines = []
    for tile, bits in sorted(groups, key=_area):
        mine = groups[tile, bits]
        loops = [span(row["sass_per_iteration"] for row in mine if row["arch"] == arch) or "–" for arch in archs]
        cost = span(round(row["sass_per_kmac"], 2) for row in mine if row["arch"] == min(r["arch"] for r in mine))
        registers, shared = span(row["registers"] for row in mine), span(row["shared_bytes"] for row in mine)
        lines.append([f"W{bits} {tile}", *loops, cost, registers, str(max(r["spill_bytes"] for r in mine)), shared])
    headers = ["tile", *(f"sm_{arch}" for arch in archs), "per 1000 MAC", "registers", "spill B", "shared B"]
    return markdown(headers, lines)


def other_kernels(rows: Sequence[Row]) -> str:
    """Registers, spills and shared memory of all kernels but GEMMs, over widths and architectures."""
    others = [row for row in rows if "sass" not in row]
    lines = [
        [
            f"`{name}`",
            str(len(mine)),
            span(row["registers"] for row in mine),
            str(max(row["spill_bytes"] for row in mine)),
            span(row["shared_bytes"] for row in mine),
        ]
        for name, mine in grouped(others, lambda row: row["kernel"]).items()
    ]
    return markdown(["kernel", "compiled", "registers", "spill B", "shared B"], lines)


def _aligned(launches: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """The launches of a block by what they compute: other numbers of rows may take fewer launches, or other kernels."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in launches:
        what = ("gemm", row["N"], row["K"]) if "N" in row else (row["kernel"].rstrip("0123456789"),)
        turn = sum(known[: len(what)] == what for known in found)
        key = (*what, turn)
        found[key] = row
    return found


def traffic(rows: Sequence[Row]) -> str:
    """Launches of a block: bytes asked for over the least, sectors over the least, instructions, per number of rows."""
    block = [row for row in rows if row["part"] == "block"]
    recipes = list(dict.fromkeys(row["recipe"] for row in block))
    counts = sorted({row["rows"] for row in block})
    lines = []
    for recipe in recipes:
        by_count = [_aligned([r for r in block if r["recipe"] == recipe and r["rows"] == m]) for m in counts]
        for key in max(by_count, key=len):
            same = [launches.get(key) for launches in by_count]
            there = [row for row in same if row is not None]
            size = f" {there[0]['N']}×{there[0]['K']}" if "N" in there[0] else ""
            kernels = ", ".join(f"`{name}`" for name in dict.fromkeys(row["kernel"] for row in there))
            line = [recipe, kernels + size]
            for row in same:
                if row is None:
                    line += [""] * 4
                    continue
                cost = row.get("instructions_per_kmac")
                line += [f"{row['bytes'] / 1e3:.0f}", f"{row['ratio']:.3f}", f"{row['sector_ratio']:.3f}"]
                line.append("" if cost is None else f"{cost:.2f}")
            lines.append(line)
    headers = ["", "launch"]
    for m in counts:
        headers += [f"M={m}: kB", "asked / least", "sectors / least", "per 1000 MAC"]
    return markdown(headers, lines, left=2)


def predictions(report: Mapping[str, Any]) -> str:
    """Decode steps of whole models: lower bounds in ms by GPU."""
    steps = report["steps"]
    gpus = list(dict.fromkeys(row["gpu"] for row in steps))
    lines = []
    for (model, contender, images), mine in grouped(
        steps, lambda row: (row["model"], row["contender"], row["images"])
    ).items():
        by_gpu = {row["gpu"]: row for row in mine}
        cells = [f"{by_gpu[g]['seconds'] * 1e3:.2f} ({by_gpu[g]['fp16_seconds'] * 1e3:.2f})" for g in gpus]
        lines.append([f"{model} {contender}", str(images), str(mine[0]["launches"]), *cells])
    return markdown(["prediction, not timed", "images", "launches", *gpus], lines)


def tables(report: Mapping[str, Any], backend: str = "triton") -> dict[str, str]:
    """The tables of a backend from a report, by name.

    Raises:
        ValueError: it is none of those this module knows.
    """

    def mine(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.get("backend", backend) == backend]

    if "sass" in report.get("units", {}):
        rows = mine(report["rows"])
        return {"gemm": (cuda_loops if backend == "cuda" else gemm_loops)(rows), "kernels": other_kernels(rows)}
    if "scaling" in report:
        found = {}
        if any(row["part"] == "block" for row in mine(report["rows"])):
            found["traffic"] = traffic(mine(report["rows"]))
        if backend == "cuda" and any(row["part"] == "linears" for row in report["rows"]):
            found["linears"] = linears(report["rows"])
        return found
    if report.get("timed") is False:
        return {"predictions": predictions({**report, "steps": mine(report["steps"])})}
    raise ValueError("not a report of benchmarks.resources or traffic, and not a prediction of benchmarks.latency")


def inserted(document: str, name: str, table: str) -> str:
    """The document with a table in the place of that name.

    Raises:
        ValueError: there is no such place.
    """
    before, mark, rest = document.partition(f"<!-- {name} -->")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise ValueError(f"the document has no <!-- {name} --> ... <!-- end -->")
    return f"{before}{mark}\n\n{table}\n\n{end}{after}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="The tables of docs/triton.md or docs/cuda.md, printed or put into the document.")
def main(
    files: Annotated[list[Path], typer.Argument(help="JSON of benchmarks.resources, traffic, latency")],
    into: Annotated[Path | None, typer.Option(help="Markdown to put the tables into")] = None,
    backend: Annotated[str, typer.Option(help="whose tables")] = "triton",
) -> None:
    document = None if into is None else into.read_text(encoding="utf-8")
    for path in files:
        report = json.loads(path.read_text(encoding="utf-8"))
        try:
            for name, table in tables(report, backend).items():
                if document is None:
                    print(f"`{report['command']}`\n\n{table}\n")
                else:
                    document = inserted(document, name, table)
        except ValueError as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
    if into is not None and document is not None:
        with replacing(into) as temporary:
            temporary.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    app()
