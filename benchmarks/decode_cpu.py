"""Whole images on a CPU, with guidance: this package's integer generators against torch in three forms.

    python -m benchmarks.decode_cpu --quick
    python -m benchmarks.decode_cpu --json out/decode_cpu.json --plot out/decode_cpu.png
    python -m benchmarks.decode_cpu --models rar_l --batches 1 --contenders w6a6,fp32

rar_b and rar_l have random weights; the bundled model is quantized without what only improves its weights. Contenders
of a model and batch size alternate in one process, image by image, and times are medians over the rounds. fp32 is
``RAR.generate``, compiled the same with a compiled step, dynamic_int8 ``torch.ao.quantization`` for its linears.
Slow contenders generate whole images of rar_l, one at once; otherwise, and with --quick, they run single steps, spread
over the image, from which its time is put together (``estimated``). Peak memory is measured in a process per contender,
from loading the file to the last token. Let nothing else run meanwhile.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ptq4arvg.files import write_json

from .decode_alloc import allocations
from .decode_memory import in_a_process
from .decode_models import CONTENDERS, MODELS, OURS, PEERS, checked, config_of, contenders, file_of
from .decode_report import allocation_table, cell_table, machine_line, plot, summarize, summary_table
from .decode_steps import Contender, alternate
from .limits import describe
from .names import names, numbers

WIDTH = 150
BATCHES, QUICK_BATCHES = (1, 8), (1,)
ROUNDS, QUICK_ROUNDS = 7, 3
# Where slow contenders, too, generate whole images (a minute each), and how many.
WHOLE, SLOW_ROUNDS = ("rar_l", 1), 3
# Single steps per round where a whole image would take too long.
PEER_STEPS, QUICK_PEER_STEPS, QUICK_STEPS = 16, 8, 64
MEMORY_STEPS = 4


def steps_and_rounds(
    contender: str, model: str, batch: int, rounds: int, steps: int | None, quick: bool
) -> tuple[int | None, int]:
    """Steps of an image that are run, None for all, and in how many rounds."""
    if steps is not None:
        return steps, rounds
    peer = contender in PEERS
    if model == "bundled":
        return None, rounds
    if quick:
        return QUICK_PEER_STEPS if peer else QUICK_STEPS if batch > 1 else None, rounds
    if not peer:
        return None, rounds
    return (None, min(rounds, SLOW_ROUNDS)) if (model, batch) == WHOLE else (PEER_STEPS, rounds)


def memory_steps(contender: str, model: str, batch: int, quick: bool) -> int | None:
    """Steps of an image generated for the peak of memory, None for all."""
    whole = contender in OURS or model == "bundled" or (contender == "fp32" and (model, batch) == WHOLE and not quick)
    return None if whole else MEMORY_STEPS


def measure_cell(
    model: str, batch: int, models: dict[str, Any], rounds: int, steps: int | None, quick: bool
) -> list[dict[str, Any]]:
    """A row per contender, without memory."""
    torch._dynamo.reset()
    taking_part = {
        name: Contender(generator, batch, *steps_and_rounds(name, model, batch, rounds, steps, quick))
        for name, generator in models.items()
    }
    warm = {name: contender.warm_up() for name, contender in taking_part.items()}
    graphs = _graphs()
    alternate(list(taking_part.values()))
    rows = []
    for name, contender in taking_part.items():
        row = {"model": model, "batch": batch, "contender": name}
        row |= contender.turns.row(batch, contender.model.config.tokens) | {"warm_up_s": warm[name]}
        if name == "compiled":
            row |= {"compile_s": warm[name], "graphs": graphs, "recompiled": _graphs() - graphs}
        rows.append(row)
    return rows


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="Whole images on a CPU, with guidance: our integer generators against torch in three forms.")
def main(
    models: Annotated[str, typer.Option(help=f"of {','.join(MODELS)}")] = ",".join(MODELS),
    batches: Annotated[str | None, typer.Option(help="images at once; default: 1,8, with --quick 1")] = None,
    contenders_: Annotated[str, typer.Option("--contenders", help=f"of {','.join((*OURS, *PEERS))}")] = ",".join(
        CONTENDERS
    ),
    rounds: Annotated[int | None, typer.Option(min=1, help="alternations; default: 7, with --quick 3")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="tokens of an image that are decoded; default: all, fewer where slow")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one image at once, fewer steps of slow contenders")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure peak memory")] = True,
    json: Annotated[Path | None, typer.Option(help="file of figures, written after every batch size")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG of speed and memory")] = None,
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        default = QUICK_BATCHES if quick else BATCHES
        chosen_models, sizes = names(models), list(default) if batches is None else numbers("--batches", batches)
        chosen = [checked(name) for name in names(contenders_)]
        for model in chosen_models:
            config_of(model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    start = time.monotonic()
    report: dict[str, Any] = {
        "machine": describe(threads, None),
        "command": shlex.join(["python", "-m", "benchmarks.decode_cpu", *sys.argv[1:]]),
        "rounds": rounds or (QUICK_ROUNDS if quick else ROUNDS),
        "rows": [],
        "allocations": [],
        "summary": {},
    }
    console.print(machine_line(report["machine"]))
    with tempfile.TemporaryDirectory(prefix="decode_cpu-") as folder:
        for model in chosen_models:
            generators = contenders(Path(folder), model, chosen)
            of_model = []
            for batch in sizes:
                of_model += measure_cell(model, batch, generators, report["rounds"], steps, quick)
                for name in chosen:
                    if name in OURS:
                        found = allocations(generators[name], batch)
                        report["allocations"].append({"model": model, "contender": name} | found)
            del generators  # the processes that measure memory need room
            for row in of_model:
                row |= dict.fromkeys(("peak_memory_mb", "load_peak_mb", "decode_peak_mb"))
                name, batch = row["contender"], row["batch"]
                if memory and not (quick and (model != "rar_l" or batch != 1 or name == "compiled")):
                    fewer = memory_steps(name, model, batch, quick)
                    path = file_of(Path(folder), model, name)
                    row |= in_a_process(path, model, name, batch, threads, fewer) | {"memory_steps": fewer}
            report["rows"] += of_model
            report["minutes"] = (time.monotonic() - start) / 60
            report["summary"] = summarize(report["rows"], report["allocations"])
            for batch in sizes:
                console.print(cell_table(model, batch, [row for row in of_model if row["batch"] == batch]))
            if json is not None:
                write_json(json, report)
            for path in Path(folder).iterdir():
                path.unlink()
    if report["allocations"]:
        console.print(allocation_table(report["allocations"]))
    console.print(summary_table(report["summary"]))
    disturbed, rows = report["summary"]["disturbed"], report["rows"]
    if disturbed:
        console.print(f"{disturbed} of {len(rows)} rows were measured while other processes ran (others, in cores)")
    if picture is not None:
        plot(picture, rows)


if __name__ == "__main__":
    app()
