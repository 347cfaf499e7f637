"""Linear layers on a CPU: this package's integer kernels against other libraries, float32 rows in and out.

    python -m benchmarks.linear_cpu --quick
    python -m benchmarks.linear_cpu --json out/linear_cpu.json --plot out/linear_cpu.png
    python -m benchmarks.linear_cpu --monotone --models rar_l --layers qkv

All contenders alternate in one process, round by round, each over so many copies of the layer that its weights come
from memory. Times are medians over the rounds, ratios medians of the ratios within a round. Peers that are not
installed (``pip install 'ptq4arvg[bench]'``) are named and left out. Let nothing else run meanwhile.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ptq4arvg.files import write_json
from ptq4arvg_kernels import BackendError, backends, use_backend

from .contenders import OUR_NAMES, OURS, Contender, Ours
from .limits import describe, highest, last_level_cache, machine_limits
from .linear_measure import burst_seconds, measure_shape
from .linear_report import machine_table, monotone_table, plot, ratio_table, shape_table, summary_table
from .linear_summary import cells_of, disturbed, summarize
from .monotone import measure_monotone
from .names import names
from .peers_cpu import PEERS
from .shapes import LAYERS, MODELS, LayerShape, layer_shapes

ROWS = (1, 2, 8, 16, 32, 64, 128, 200, 512)
EVERY_ROW = range(1, 130)
WIDTH = 200
MINUTES = 25.0
QUICK_LAYERS = ("qkv", "proj", "fc1", "fc2", "adaln")
QUICK_ROWS, QUICK_MINUTES = (1, 2, 16, 64, 200), 3.0


def chosen_contenders(peers: Sequence[str], threads: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Our kernels and the peers that run here, and why the others do not.

    Raises:
        ValueError: a peer is unknown.
    """
    contenders: dict[str, Contender] = {f"w{w}a{a}": Ours(w, a) for w, a in OURS}
    missing: dict[str, str] = {}
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; known are {', '.join(PEERS)}")
        peer = PEERS[name](threads)
        reason = peer.missing()
        if reason is None:
            contenders[name] = peer
        else:
            missing[name] = reason
    return contenders, missing


def checked_backend(name: str) -> str:
    """The backend's name if it runs here; nothing else may stand in for what is measured.

    Raises:
        BackendError: it is not registered, or says why it cannot run.
    """
    for backend in backends():
        if backend.name == name:
            reason = backend.unavailable()
            if reason is None:
                return name
            raise BackendError(f"backend {name!r} cannot run here: {reason}")
    known = ", ".join(backend.name for backend in backends())
    raise BackendError(f"no backend {name!r} is registered (there are: {known}); choose with --backend")


def row_counts(text: str) -> list[int]:
    """Increasing row counts from ``"1,2,16"`` or ``"1-129"``.

    Raises:
        ValueError: not positive numbers.
    """
    counts: set[int] = set()
    for part in names(text):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(first) < 1:
            raise ValueError(f"--rows {text!r}: {part!r} is not a number of rows; write 1,2,16 or 1-129")
        counts.update(range(int(first), int(last or first) + 1))
    if not counts:
        raise ValueError(f"--rows {text!r} names no number of rows; write 1,2,16 or 1-129")
    return sorted(counts)


def measure(
    console: Console,
    shapes: Sequence[LayerShape],
    counts: Sequence[int],
    contenders: dict[str, Contender],
    rounds: int,
    minutes: float,
    report: dict[str, Any],
    path: Path | None,
) -> None:
    """Measure all cells into ``report["rows"]``, print every shape when it is done and write ``path``.

    Stops, and says so, when the time is over. No progress bar: drawing it would take time of the measured cores.
    """
    cells, start = len(shapes) * len(counts), time.monotonic()
    done = 0
    for shape in shapes:
        of_shape: list[dict[str, Any]] = []
        left = minutes - (time.monotonic() - start) / 60  # what a slow shape took is saved on those after it
        burst_s = burst_seconds(left, cells - done, len(contenders), rounds)
        for rows in measure_shape(shape, counts, contenders, rounds, burst_s, last_level_cache()):
            of_shape += rows
            done += 1
            late = time.monotonic() - start > 60 * minutes
            if late:
                break
        report["rows"] += of_shape
        report["minutes"] = (time.monotonic() - start) / 60
        report["summary"] = summarize(report["rows"], report["machine"]["limits"])
        console.print(shape_table(f"{shape.name}: {', '.join(shape.users)}", of_shape))
        if path is not None:
            write_json(path, report)
        if late:
            break
    if done < cells:
        console.print(f"stopped after {minutes:g} minutes: {done} of {cells} cells measured; see --minutes")


def conclude(console: Console, report: dict[str, Any]) -> None:
    """Print the ratios and the summary; if other processes ran during some cells, also the summary without those."""
    summary = report["summary"]
    for kernel in OUR_NAMES:
        console.print(ratio_table(kernel, summary["ratios"][kernel]))
    console.print(summary_table("summary", summary))
    count = summary["disturbed_cells"]
    if not count:
        return
    console.print(
        f"{count} of {summary['cells']} cells were measured while other processes ran (column others, in cores)"
    )
    quiet = [row for cell in cells_of(report["rows"]).values() if not disturbed(cell) for row in cell.values()]
    if quiet:
        report["summary_undisturbed"] = summarize(quiet, report["machine"]["limits"])
        console.print(summary_table("summary of the other cells", report["summary_undisturbed"]))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help="Linear layers on a CPU: our integer kernels against other libraries, float32 in and out.")
def main(
    models: Annotated[str | None, typer.Option(help=f"of {','.join(MODELS)}; default: all")] = None,
    layers: Annotated[str | None, typer.Option(help=f"of {','.join(LAYERS)}; default: all")] = None,
    rows: Annotated[str | None, typer.Option(help="numbers of rows M, 1,2,16 or 1-129")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="alternations; below 7 medians mean little")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    peers: Annotated[str, typer.Option(help="libraries to compare with; empty for none")] = ",".join(PEERS),
    backend: Annotated[str, typer.Option(help="backend of our kernels; no other stands in for it")] = "cpu",
    minutes: Annotated[float | None, typer.Option(help="time limit; default: 25, with --quick 3")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one shape per kind of rar_l, five row counts")] = False,
    monotone: Annotated[bool, typer.Option("--monotone", help="only our kernels, every M, first shape")] = False,
    json: Annotated[Path | None, typer.Option(help="file of figures, written after every shape")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG of GOPS over M")] = None,
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checked_backend(backend)
        default_models = ("rar_l",) if quick or monotone else MODELS
        default_layers = QUICK_LAYERS if quick else LAYERS
        shapes = layer_shapes(names(models) if models else default_models, names(layers) if layers else default_layers)
        default_rows = EVERY_ROW if monotone else QUICK_ROWS if quick else ROWS
        counts = row_counts(rows) if rows else list(default_rows)
        contenders, missing = chosen_contenders([] if monotone else names(peers), threads)
    except (ValueError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    for name, reason in missing.items():
        console.print(f"missing: {name} ({reason})")
    limits = machine_limits(threads) if backend == "cpu" else None
    machine = describe(threads, limits)
    console.print(machine_table(machine))
    report: dict[str, Any] = {
        "machine": machine,
        "command": shlex.join(["python", "-m", "benchmarks.linear_cpu", *sys.argv[1:]]),
        "backend": backend,
        "rounds": rounds,
        "missing": missing,
        "rows": [],
        "summary": {},
    }
    with torch.inference_mode(), use_backend(backend, strict=True):
        if monotone:
            result = measure_monotone(contenders, shapes[0], counts, rounds, last_level_cache())
            report["monotone"] = result
            report["summary"]["monotone_worst"] = {name: worst["ratio"] for name, worst in result["worst"].items()}
            console.print(monotone_table(result))
        else:
            limit = minutes or (QUICK_MINUTES if quick else MINUTES)
            measure(console, shapes, counts, contenders, rounds, limit, report, json)
            if limits is not None:  # once more: the bandwidth of a shared machine is not the same half an hour later
                machine["limits"] = highest(limits, machine_limits(threads))
                report["summary"] = summarize(report["rows"], machine["limits"])
                console.print(machine_table(machine))
            conclude(console, report)
    if json is not None:
        write_json(json, report)
    if picture is not None:
        plot(picture, report["rows"], machine, report.get("monotone"))


if __name__ == "__main__":
    app()
