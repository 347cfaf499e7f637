"""Registers, spills, shared memory and main-loop instructions of every compiled GPU kernel. No GPU takes part.

    python -m benchmarks.resources --quick
    python -m benchmarks.resources --json docs/resources.json
    python -m benchmarks.resources --backend cuda --json docs/resources.json

The launches are those that the Triton backend makes for the layers of the published RAR models, of all row buckets,
on a GPU of each architecture; every kernel that differs is compiled once. Of a GEMM, the static instructions of the
loop over K are counted: per K tile and warp, and per 1000 multiply-adds of the block's tile. An instruction of a warp
counts once, not once per lane; those of all warps are added up.

Of the CUDA backend, every kernel of the compiled module is compiled by nvcc for each architecture, and main loops stand
beside their floor (benchmarks/cuda_tiles.py). A file of figures keeps the lines of backends that are not measured.
"""

from __future__ import annotations

import json as json_module
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ptq4arvg.files import replacing
from ptq4arvg_kernels.backends.triton.launch import Launch

from . import cuda_resources
from .cuda_compiled import nvcc_version
from .gpu_backends import BACKENDS
from .gpu_devices import ARCHITECTURES
from .gpu_report import PRINTED_WIDTH, resource_table
from .gpu_steps import Step
from .names import names, numbers
from .rar_shapes import RAR_MODELS
from .sass import tile_macs
from .tables import span
from .triton_compiled import Compiled, examine, triton_version
from .triton_launches import GEMM, is_gemm, kernel_name, tile_name, variant_name

RECIPES = ("w8a8", "w6a8")
# Sequences of a decode step, for every bucket of rows: a full last tile, and a ragged one.
ROWS = (2, 16, 24, 32, 48, 64, 128, 200)
POSITION = 128
# (sequences, positions): the first step of an image, and a full pass.
PASSES = ((2, 2), (8, 256))
UNITS = {
    "registers, spill_bytes": "per thread",
    "shared_bytes": "dynamic shared memory of a block",
    "sass": "static instructions of the loop over K, per K tile and warp",
    "sass_per_kmac": "of all warps, per 1000 multiply-adds of the block's tile; a warp's instruction is one",
    "products_over_tile": "products that the warps compute, over those of the tile",
    "floor": "cuda: the least instructions of a warp and iteration, by formula (benchmarks/cuda_tiles.py)",
    "over_floor, over_published_floor": "sass_per_iteration over the floor; with 9, and 10, operations per 16 weights",
    "unpack_per_weight": "instructions of a lane for a weight that 6 bits take more than 8",
}
KNOWN_ARCHS = ", ".join(map(str, ARCHITECTURES))
QUICK_MODELS, QUICK_RECIPES, QUICK_ROWS, QUICK_ARCHS = ("rar_l",), ("w6a8",), (2,), (80,)
QUICK_KERNELS = {"triton": ("gemm/store", "adaln"), "cuda": ("qkv_append", "gemm_w6_16x64_gate", "gemm_w8_16x64_gate")}


@dataclass
class Variant:
    """A kernel as the dispatcher wants it, and by whom it is wanted."""

    launch: Launch
    users: list[str] = field(default_factory=list)


def _identity(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches of one kernel: constants, warps, stages, dtypes. Of a GEMM any split along K is like another,
    and so is any order of the tiles."""
    if is_gemm(launch):
        return kernel_name(launch), tile_name(launch), variant_name(launch)
    constants = {name: str(value) for name, value in launch.constants.items()}
    kinds = {name: str(getattr(value, "dtype", value is None)) for name, value in launch.arguments.items()}
    return kernel_name(launch), tuple(constants.items()), tuple(kinds.items()), launch.num_warps


def variants(
    models: Sequence[str], recipes: Sequence[str], rows: Sequence[int], archs: Sequence[int], passes: bool = True
) -> dict[int, dict[tuple[Any, ...], Variant]]:
    """The different kernels that decode steps of these models start, by architecture of the GPU; with ``passes`` also
    those of steps over many positions."""
    found: dict[int, dict[tuple[Any, ...], Variant]] = {arch: {} for arch in archs}
    devices = [ARCHITECTURES[arch] for arch in archs]
    for model in models:
        for recipe in recipes:
            steps = [Step(model, recipe, m, POSITION) for m in rows]
            if passes:
                steps += [Step(model, recipe, sequences, 0, length) for sequences, length in PASSES]
            for step in steps:
                for arch, parts in zip(archs, step.record_all(devices), strict=True):
                    for part, launches in parts.items():
                        for launch in launches:
                            variant = found[arch].setdefault(_identity(launch), Variant(launch))
                            variant.users.append(f"{model} {part} M={step.sequences * step.length}")
    return found


def row(arch: int, variant: Variant, compiled: Compiled) -> dict[str, Any]:
    """The table's line of a kernel."""
    launch, constants = variant.launch, variant.launch.constants
    line: dict[str, Any] = {
        "backend": "triton",
        "kernel": kernel_name(launch),
        "tile": tile_name(launch),
        "variant": variant_name(launch),
        "arch": arch,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "threads": compiled.threads,
        "first_user": variant.users[0],
        "users": len(variant.users),
    }
    loop = compiled.hot_loop
    if loop is None:
        return line
    macs = constants["BM"] * constants["BN"] * constants["BK"]
    warps = launch.num_warps
    per_iteration = {name: round(count, 2) for name, count in loop.per_iteration().items()}
    line |= {
        "w_bits": constants["BITS"],
        "sass_per_iteration": loop.total / loop.iterations,
        "sass": per_iteration,
        "matrix": loop.matrix,
        "unrolled": loop.iterations,
        # Above 1: warps repeat each other's products.
        "products_over_tile": tile_macs(loop.matrix, warps, constants["BM"], constants["BN"]) / macs / loop.iterations,
        "sass_per_kmac": round(1000 * loop.total / loop.iterations * warps / macs, 4),
    }
    return line


def measure(
    models: Sequence[str],
    recipes: Sequence[str],
    rows: Sequence[int],
    archs: Sequence[int],
    kernels: Sequence[str] = (),
    passes: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """Yields the lines of an architecture, one per kernel, in the order of ``archs``.

    Args:
        kernels: beginnings of the names of the kernels to compile; empty for all.
        passes: see :func:`variants`.
    """
    for arch, of_arch in variants(models, recipes, rows, archs, passes).items():
        wanted = [v for v in of_arch.values() if not kernels or kernel_name(v.launch).startswith(tuple(kernels))]
        yield [row(arch, variant, examine(variant.launch, arch)) for variant in wanted]


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What to look at first: which kernels spill, and the largest main loops."""
    rows = list(rows)
    gemms = [line for line in rows if line["kernel"].startswith(GEMM)]
    floors = [line for line in gemms if "over_floor" in line]
    return {
        "kernels": len(rows),
        "spilling": [
            f"sm_{line['arch']} {line['kernel']} {line['tile']} {line['variant']}: {line['spill_bytes']} bytes"
            for line in rows
            if line["spill_bytes"]
        ],
        "most_registers": max((line["registers"] for line in rows), default=0),
        "repeated_products": sorted(
            {
                f"sm_{line['arch']} w{line['w_bits']} {line['tile']}: {line['products_over_tile']:g} times"
                for line in gemms
                if line["products_over_tile"] > 1
            }
        ),
        "over_floor": {
            f"w{bits}": span(round(line["over_floor"], 3) for line in floors if line["w_bits"] == bits)
            for bits in sorted({line["w_bits"] for line in floors})
        },
        "most_over_floor": [
            f"sm_{line['arch']} {line['kernel']}: {line['over_floor']:.3f}"
            for line in sorted(floors, key=lambda line: -line["over_floor"])[:5]
        ],
        "unpack_per_weight": span(line["unpack_per_weight"] for line in floors if "unpack_per_weight" in line),
        "loops_with_prmt": sorted({f"sm_{line['arch']} {line['tile']}" for line in gemms if line["sass"].get("PRMT")}),
    }


def write_compact(path: Path, report: dict[str, Any]) -> None:
    """JSON with one row per line: a diff of the committed table shows the kernels that changed."""
    head = {key: value for key, value in report.items() if key != "rows"}
    text = json_module.dumps(head, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join(f"  {json_module.dumps(line, ensure_ascii=False)}" for line in report["rows"])
    with replacing(path) as temporary:
        temporary.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def kept(path: Path | None, backends: Sequence[str]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Commands and lines of a file's other backends.

    Raises:
        ValueError: the file is no such report.
    """
    if path is None or not path.exists():
        return {}, []
    report = json_module.loads(path.read_text(encoding="utf-8"))
    if "rows" not in report or "command" not in report:
        raise ValueError(f"{path} is no report of benchmarks.resources; name another file")
    commands = report["command"] if isinstance(report["command"], dict) else {"triton": report["command"]}
    rows = [line for line in report["rows"] if line["backend"] not in backends]
    return {name: command for name, command in commands.items() if name not in backends}, rows


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="Registers, spills, shared memory and main-loop instructions of the compiled GPU kernels.")
def main(
    models: Annotated[str | None, typer.Option(help=f"of {','.join(RAR_MODELS)}; default: all")] = None,
    recipes: Annotated[str | None, typer.Option(help="default: w8a8,w6a8 (w6a6 runs the kernels of w6a8)")] = None,
    rows: Annotated[str | None, typer.Option(help="numbers of rows M; default: of every bucket")] = None,
    archs: Annotated[str | None, typer.Option(help=f"of {','.join(map(str, ARCHITECTURES))}; default: all")] = None,
    kernels: Annotated[str, typer.Option(help="beginnings of names of kernels; default: all")] = "",
    backend: Annotated[str, typer.Option(help=f"of {','.join(BACKENDS)}")] = ",".join(BACKENDS),
    quick: Annotated[bool, typer.Option("--quick", help="two kernels of one architecture")] = False,
    json: Annotated[Path | None, typer.Option(help="file of figures")] = None,
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PRINTED_WIDTH)
    try:
        chosen_models = names(models) if models else list(QUICK_MODELS if quick else RAR_MODELS)
        chosen_recipes = names(recipes) if recipes else list(QUICK_RECIPES if quick else RECIPES)
        counts = numbers("--rows", rows) if rows else list(QUICK_ROWS if quick else ROWS)
        chosen_archs = numbers("--archs", archs) if archs else list(QUICK_ARCHS if quick else ARCHITECTURES)
        chosen_backends = names(backend)
        for name in chosen_backends:
            if name not in BACKENDS:
                raise ValueError(f"--backend: unknown backend {name!r}; known are {', '.join(BACKENDS)}")
        for arch in chosen_archs:
            if arch not in ARCHITECTURES:
                raise ValueError(f"--archs: unknown architecture {arch}; known are {KNOWN_ARCHS}")
        command = shlex.join(["python", "-m", "benchmarks.resources", *sys.argv[1:]])
        commands, lines = kept(json, chosen_backends)
        report: dict[str, Any] = {
            "command": commands | dict.fromkeys(chosen_backends, command),
            "triton": triton_version(),
            **({"nvcc": nvcc_version()} if "cuda" in chosen_backends else {}),
            "units": UNITS,
            "summary": {},
            "rows": lines,
        }
        for name in chosen_backends:
            chosen_kernels = names(kernels) if kernels else list(QUICK_KERNELS[name] if quick else ())
            if name == "cuda":
                found_by_arch = cuda_resources.measure(chosen_archs, chosen_kernels)
            else:
                found_by_arch = measure(
                    chosen_models, chosen_recipes, counts, chosen_archs, chosen_kernels, passes=not quick
                )
            for arch, found in zip(chosen_archs, found_by_arch, strict=True):
                console.print(resource_table(f"{name} sm_{arch}", found))
                report["rows"] += found
                report["summary"] = summarize(report["rows"])
                if json is not None:
                    write_compact(json, report)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    summary = report["summary"]
    console.print(f"{summary['kernels']} kernels, at most {summary['most_registers']} registers per thread")
    for title, key in (("spills", "spilling"), ("repeats products", "repeated_products")):
        for line in summary[key]:
            console.print(f"{title}: {line}")


if __name__ == "__main__":
    app()
