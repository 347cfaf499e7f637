"""Memory traffic of one block of a decode step, counted by emulating the compiled kernels. No GPU takes part.

    python -m benchmarks.traffic --quick
    python -m benchmarks.traffic --rows 2,16,200 --json out/traffic.json
    python -m benchmarks.traffic --backend cuda --parts block,linears --rows 2,16,200 --json out/traffic_cuda.json
    python -m benchmarks.traffic --backend cuda --parts shapes

Every launch of a block of a published RAR, and of its modulation, is compiled for one architecture and executed in
the PTX emulator of the tests: bytes that lanes ask global memory for, beside the least there is (traffic_minimum.py),
the sectors these touch, and the wavefronts of shared memory. Lanes that ask for the same bytes count each, so that
bytes exceed the least where lanes share scales or positions, and so does the sector efficiency 1; sectors count once.
Blocks of a grid that do the same on other data are executed once and counted as often as there are; with --whole all
are executed, and the figures are the same.

Two more parts are asked for by name: ``linears``, single products of 4096 channels and 1024 inputs, and ``shapes``, the
products of the layers of RAR, VAR and PAR from one row to many (minutes).
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ptq4arvg.files import write_json

from .emulated_traffic import Traffic
from .gpu_backends import BACKENDS, GpuBackend, gpu_backend
from .gpu_devices import ARCHITECTURES
from .gpu_report import PRINTED_WIDTH, traffic_table
from .gpu_steps import Step
from .linear_launches import SHAPE_ROWS, SINGLE, SINGLE_ROWS, Linear, all_shapes, linears
from .names import names, numbers
from .rar_shapes import RAR_MODELS
from .traffic_minimum import Minimum

RECIPES, ROWS, POSITION = ("w8a8", "w6a8"), (2, 16), 128
PARTS = ("modulation", "block")
MORE_PARTS = ("linears", "shapes")
QUICK_MODEL, QUICK_RECIPES, QUICK_ROWS, QUICK_POSITION = "rar_b", ("w6a8",), (2,), 16
SCALING = (
    "blocks of a grid that do the same on other data are executed once and counted as often as there are "
    "(benchmarks/emulated_traffic.py, units); what a kernel asks for does not depend on data, so this is exact; "
    "instructions of an error function (GELU) depend on data by about a percent"
)


def ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def row(
    backend: GpuBackend, started: Any, traffic: Traffic, least: Minimum, model: str, recipe: str, rows: int, part: str
) -> dict[str, Any]:
    """The report's line of a launch."""
    line: dict[str, Any] = {
        "backend": backend.name,
        "model": model,
        "recipe": recipe,
        "rows": rows,
        "part": part,
        "kernel": backend.kernel_name(started),
        "tile": backend.tile_name(started),
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
    cut = backend.product(started)
    if cut is not None:
        m, n, k, split = cut.m, cut.n, cut.k, cut.split
        partial = 4 * m * n * (2 * split - 1) if split > 1 else 0
        line |= {
            "M": m,
            "N": n,
            "K": k,
            "w_bits": cut.w_bits,
            "split": split,
            "norm": cut.norm,
            "epilogue_bytes": least.epilogue,
            "partial_bytes": partial,
            "ratio_without_epilogue": ratio(traffic.bytes, least.requested - least.epilogue),
            "instructions_per_kmac": 1000 * traffic.instructions.total() / (m * n * k),
        }
    return line


def measure(step: Step, arch: int, parts: Sequence[str] = PARTS, whole: bool = False) -> Iterator[dict[str, Any]]:
    """A line per launch of the chosen parts of a step."""
    device, backend = ARCHITECTURES[arch], gpu_backend(step.backend)
    launches: dict[str, list[Any]] = {}
    step.prepare()
    for part, call in step.calls().items():
        if part in parts:
            launches[part] = backend.record(device, call)
    for part, started in launches.items():
        for one in started:
            found, least = backend.emulate(one, arch, whole), backend.minimum(one)
            yield row(backend, one, found, least, step.model, step.recipe, step.sequences * step.length, part)


def measure_linear(linear: Linear, backend: GpuBackend, arch: int, part: str) -> dict[str, Any]:
    """The line of a single product, see :class:`.linear_launches.Linear`."""
    started = linear.record(backend, ARCHITECTURES[arch])
    found = backend.emulate(started, arch)
    line = row(backend, started, found, backend.minimum(started), linear.user, linear.recipe, linear.m, part)
    cut, loop = backend.product(started), backend.hot_loop(started, arch)
    assert cut is not None
    issued = cut.blocks * cut.steps * cut.warps * loop.total / loop.iterations
    return line | {"loop_sass_per_kmac": 1000 * issued / (cut.m * cut.n * cut.k)}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per recipe and number of rows: launches of a block (or single products), their bytes, and the worst figures."""
    summary: dict[str, Any] = {}
    for line in rows:
        what = line["part"] if line["part"] in MORE_PARTS else line["model"]
        key = f"{line['backend']} {what} {line['recipe']} M={line['rows']}"
        summary.setdefault(key, [])
        if line["part"] != "modulation":
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
        "gemm_loop_bank_factor_worst": max((line["loop_bank_factor"] or 0 for line in gemms), default=None),
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
    parts: Annotated[str, typer.Option(help=f"of {','.join((*PARTS, *MORE_PARTS))}")] = ",".join(PARTS),
    backend: Annotated[str, typer.Option(help=f"of {','.join(BACKENDS)}; one, or both")] = "triton",
    arch: Annotated[int, typer.Option(help="compute capability of the GPU")] = 80,
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
        chosen_parts, gpus = names(parts), [gpu_backend(name) for name in names(backend)]
        for part in chosen_parts:
            if part not in (*PARTS, *MORE_PARTS):
                raise ValueError(f"--parts: unknown part {part!r}; known are {', '.join((*PARTS, *MORE_PARTS))}")
        for gpu in gpus:
            if arch not in gpu.capabilities:
                known = ", ".join(map(str, gpu.capabilities))
                raise ValueError(f"--arch {arch}: the emulator executes kernels of {gpu.name} for {known}")
        of_steps = [part for part in chosen_parts if part in PARTS]
        for gpu, recipe, count in product(gpus, chosen_recipes, counts) if of_steps else ():
            step = Step(chosen_model, recipe, count, at, backend=gpu.name)
            of_step = list(measure(step, arch, of_steps, whole))
            console.print(traffic_table(f"{gpu.name}: {chosen_model} {recipe}, {count} rows, sm_{arch}", of_step))
            lines += of_step
        single = {"linears": ([SINGLE], SINGLE_ROWS), "shapes": (all_shapes(), SHAPE_ROWS)}
        for gpu, part in product(gpus, [part for part in chosen_parts if part in single]):
            shapes, rows_of_shape = single[part]
            found = linears(shapes, chosen_recipes, rows_of_shape)
            of_part = [measure_linear(linear, gpu, arch, part) for linear in found]
            console.print(traffic_table(f"{gpu.name}: single products, sm_{arch}", of_part))
            lines += of_part
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.traffic", *sys.argv[1:]]),
        "backend": backend,
        **{key: value for gpu in gpus for key, value in gpu.described().items()},
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
