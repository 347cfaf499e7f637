"""Memory traffic of one block of a decode step, counted by emulating the compiled kernels. No GPU takes part.

    python -m benchmarks.traffic --quick
    python -m benchmarks.traffic --rows 2,16,200 --json out/traffic.json

Every launch of a block of a published RAR, and of its modulation, is compiled for one architecture and executed in
the PTX emulator of the tests: bytes that lanes ask global memory for, beside the least there is (traffic_minimum.py),
the sectors these touch, and the wavefronts of shared memory. Lanes that ask for the same bytes count each, so that
bytes exceed the least where lanes share scales or positions, and so does the sector efficiency 1; sectors count once.
Blocks of a grid that do the same on other data are executed once and counted as often as there are; with --whole all
are executed, and the figures are the same.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ptq4arvg.files import write_json
from ptq4arvg_kernels.backends.triton.launch import Launch

from .emulated_traffic import Traffic, emulate
from .gpu_devices import ARCHITECTURES
from .gpu_report import PRINTED_WIDTH, traffic_table
from .names import names, numbers
from .rar_shapes import RAR_MODELS
from .traffic_minimum import Minimum, minimum
from .triton_compiled import triton_version
from .triton_launches import Step, is_gemm, k_parts, kernel_name, record, tile_name

RECIPES, ROWS, POSITION = ("w8a8", "w6a8"), (2, 16), 128
PARTS = ("modulation", "block")
QUICK_MODEL, QUICK_RECIPES, QUICK_ROWS, QUICK_POSITION = "rar_b", ("w6a8",), (2,), 16
SCALING = (
    "blocks of a grid that do the same on other data are executed once and counted as often as there are "
    "(benchmarks/emulated_traffic.py, units); what a kernel asks for does not depend on data, so this is exact; "
    "instructions of an error function (GELU) depend on data by about a percent"
)


def ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def row(step: Step, part: str, started: Launch, traffic: Traffic, least: Minimum) -> dict[str, Any]:
    """The report's line of a launch."""
    line: dict[str, Any] = {
        "model": step.model,
        "recipe": step.recipe,
        "rows": step.sequences * step.length,
        "part": part,
        "kernel": kernel_name(started),
        "tile": tile_name(started),
        "blocks": traffic.blocks,
        "emulated_blocks": traffic.emulated_blocks,
        "bytes": traffic.bytes,
        "load_bytes": traffic.load_bytes,
        "store_bytes": traffic.store_bytes,
        "minimum_bytes": least.requested,
        "ratio": ratio(traffic.bytes, least.requested),
        "distinct_bytes": least.distinct,
        "sector_bytes": traffic.sector_bytes,
        "sector_ratio": ratio(traffic.sector_bytes, least.requested),
        "sector_efficiency": ratio(traffic.bytes, traffic.sector_bytes),
        "wavefronts": traffic.wavefronts,
        "ideal_wavefronts": traffic.ideal_wavefronts,
        "loop_wavefronts": traffic.loop_wavefronts,
        "loop_ideal_wavefronts": traffic.loop_ideal_wavefronts,
        "loop_bank_factor": ratio(traffic.loop_wavefronts, traffic.loop_ideal_wavefronts),
        "instructions": traffic.instructions.total(),
        "instructions_by_class": dict(traffic.instructions.most_common()),
    }
    if is_gemm(started):
        a = started.arguments
        m, n, k, split = a["M"], a["N"], a["K"], k_parts(started)
        partial = 4 * m * n * (2 * split - 1) if split > 1 else 0
        line |= {
            "M": m,
            "N": n,
            "K": k,
            "w_bits": started.constants["BITS"],
            "split": split,
            "epilogue_bytes": least.epilogue,
            "partial_bytes": partial,
            "ratio_without_epilogue": ratio(traffic.bytes, least.requested - least.epilogue),
            "instructions_per_kmac": 1000 * traffic.instructions.total() / (m * n * k),
        }
    return line


def measure(step: Step, arch: int, parts: Sequence[str] = PARTS, whole: bool = False) -> Iterator[dict[str, Any]]:
    """A line per launch of the chosen parts of a step."""
    device = ARCHITECTURES[arch]
    launches: dict[str, list[Launch]] = {}
    step.prepare()
    for part, call in step.calls().items():
        if part in parts:
            launches[part] = record(device, call)
    for part, started in launches.items():
        for one in started:
            yield row(step, part, one, emulate(one, arch, whole), minimum(one))


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per recipe and number of rows: launches of a block, its bytes, and the worst figures."""
    summary: dict[str, Any] = {}
    for line in rows:
        key = f"{line['model']} {line['recipe']} M={line['rows']}"
        summary.setdefault(key, [])
        if line["part"] == "block":
            summary[key].append(line)
    return {key: _summary(lines) for key, lines in summary.items()}


def _summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gemms = [line for line in lines if "w_bits" in line]
    others = [line for line in lines if "w_bits" not in line]

    def total(name: str, of: Sequence[dict[str, Any]] = lines) -> int:
        return sum(line[name] for line in of)

    return {
        "launches": len(lines),
        "bytes": total("bytes"),
        "minimum_bytes": total("minimum_bytes"),
        "distinct_bytes": total("distinct_bytes"),
        "ratio": ratio(total("bytes"), total("minimum_bytes")),
        "gemm_ratio_worst": max((line["ratio"] for line in gemms), default=None),
        "other_ratio_worst": max((line["ratio"] for line in others), default=None),
        "sector_ratio": ratio(total("sector_bytes"), total("minimum_bytes")),
        "sector_efficiency": ratio(total("bytes"), total("sector_bytes")),
        "loop_bank_factor": ratio(total("loop_wavefronts"), total("loop_ideal_wavefronts")),
        "gemm_instructions_per_kmac": ratio(
            1000 * total("instructions", gemms), sum(line["M"] * line["N"] * line["K"] for line in gemms)
        ),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="Memory traffic of one block of a decode step, counted by emulating the compiled kernels.")
def main(
    model: Annotated[str | None, typer.Option(help=f"of {','.join(RAR_MODELS)}; default: rar_l")] = None,
    recipes: Annotated[str | None, typer.Option(help="default: w8a8,w6a8")] = None,
    rows: Annotated[str | None, typer.Option(help="sequences, two per image; default: 2,16")] = None,
    position: Annotated[int | None, typer.Option(min=0, help="of the token; default: 128")] = None,
    arch: Annotated[int, typer.Option(help="80, 86, 89 or 90")] = 80,
    whole: Annotated[bool, typer.Option("--whole", help="execute whole grids")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="rar_b, two rows, few slots")] = False,
    json: Annotated[Path | None, typer.Option(help="file of figures")] = None,
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PRINTED_WIDTH)
    start = time.monotonic()
    lines: list[dict[str, Any]] = []
    try:
        chosen_model = model or (QUICK_MODEL if quick else "rar_l")
        chosen_recipes = names(recipes) if recipes else list(QUICK_RECIPES if quick else RECIPES)
        counts = numbers("--rows", rows) if rows else list(QUICK_ROWS if quick else ROWS)
        at = position if position is not None else QUICK_POSITION if quick else POSITION
        if arch not in (80, 86, 89, 90):
            raise ValueError(f"--arch {arch}: the emulator executes 80, 86, 89 and 90")
        for recipe in chosen_recipes:
            for count in counts:
                step = Step(chosen_model, recipe, count, at)
                of_step = list(measure(step, arch, whole=whole))
                console.print(traffic_table(f"{chosen_model} {recipe}, {count} rows, sm_{arch}", of_step))
                lines += of_step
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.traffic", *sys.argv[1:]]),
        "triton": triton_version(),
        "arch": arch,
        "position": at,
        "whole_grids": whole,
        "scaling": None if whole else SCALING,
        "summary": summarize(lines),
        "rows": lines,
        "minutes": (time.monotonic() - start) / 60,
    }
    if json is not None:
        write_json(json, report)


if __name__ == "__main__":
    app()
