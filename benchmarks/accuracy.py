"""Accuracy of every recipe on both variants of the bundled model, with bootstrap intervals.

    python -m benchmarks.accuracy --images 5000 --json out/accuracy.json [--rows W8A8 "paper W6A6"] [--variants stress]

The figures are those of the demo, computed by the same code from more pictures. The file is written after every row;
started again with the same settings, the benchmark does the rows that are missing. It cannot see that the code
changed: name a new file then.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ptq4arvg import __version__
from ptq4arvg.evaluation import COMPARISON, PAPER, Outcome, RowSpec, Settings, row_specs
from ptq4arvg.files import write_json
from ptq4arvg.metrics import Interval, frechet_interval, mean_interval
from ptq4arvg.models.bundled import VARIANTS, load_reference, load_scorer
from ptq4arvg.row_pool import Task, default_jobs, run_rows
from ptq4arvg.scoring import Scorer

REPLICAS = 1000
WIDTH = 150


def measured(outcome: Outcome, scorer: Scorer) -> dict[str, Any]:
    """The row with 95 % intervals of its two picture figures."""

    def bounds(interval: Interval) -> list[float]:
        return [interval.low, interval.high]

    accuracy = mean_interval(outcome.seen.correct, REPLICAS)
    distance = frechet_interval(outcome.seen.features, scorer.reference, REPLICAS)
    return outcome.row.to_dict() | {
        "class_accuracy_interval": bounds(accuracy),
        "frechet_interval": bounds(distance),
    }


def read_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run with the same version and settings; none if there was no such run."""
    if not path.exists():
        return []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is not JSON ({error}); remove it or name another file") from error
    if (report.get("version"), report.get("settings")) != (__version__, settings):
        raise SystemExit(
            f"{path} holds figures of other settings ({report.get('settings')}); remove it or name another file"
        )
    return list(report["rows"])


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("model", "variant"):
        result.add_column(header, no_wrap=True)
    for header in ("MB", "SQNR dB", "KL nats", "top-1", "class (95 %)", "Fréchet (95 %)", "tok/s"):
        result.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["class_accuracy_interval"]
        near, far = row["frechet_interval"]
        result.add_row(
            row["name"],
            row["variant"],
            "–" if row["size_mb"] is None else f"{row['size_mb']:.2f}",
            "–" if row["logit_sqnr_db"] is None else f"{row['logit_sqnr_db']:.2f}",
            f"{row['kl_nats']:.5f}",
            f"{row['top1_agreement']:.2%}",
            f"{row['class_accuracy']:.1%} ({low:.1%} … {high:.1%})",
            f"{row['frechet']:.3f} ({near:.3f} … {far:.3f})",
            f"{row['tokens_per_s']:.0f}",
        )
    return result


def main() -> None:
    everything = (*COMPARISON, *PAPER)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--held-out", type=int, default=256, help="sequences of the teacher-forced figures")
    parser.add_argument("--json", type=Path, required=True, help="file of figures, written after every row")
    parser.add_argument("--rows", nargs="+", default=[spec.name for spec in everything], help="names as in the table")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--jobs", type=int, default=default_jobs(), help="rows worked on at the same time, one thread each"
    )
    args = parser.parse_args()
    settings = Settings(images=args.images, held_out=args.held_out)
    try:
        specs: list[RowSpec] = row_specs(args.rows)
    except ValueError as error:
        parser.error(str(error))
    rows = read_rows(args.json, settings.to_dict())
    done = {(row["name"], row["variant"]) for row in rows}
    torch.set_num_threads(1)  # the workers need the cores; the bootstrap here is many small operations
    tasks = [Task(variant, spec) for variant in args.variants for spec in specs if (spec.name, variant) not in done]
    console, scorer, reference = Console(), load_scorer(), load_reference()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    busy: dict[Task, str] = {}
    with console.status("starting") as status:

        def show(task: Task, fraction: float, what: str) -> None:
            busy[task] = f"{task.variant} {task.spec.name}: {what} {fraction:.0%}"
            status.update(", ".join(busy.values()))

        for task, outcome in run_rows(tasks, settings, args.jobs, show):
            busy.pop(task, None)
            rows.append(measured(outcome, scorer))
            write_json(
                args.json,
                {
                    "version": __version__,
                    "torch": torch.__version__,
                    "jobs": args.jobs,
                    "settings": settings.to_dict(),
                    "replicas": REPLICAS,
                    "reference": reference.figures,
                    "rows": rows,
                },
            )
            console.print(f"{task.variant} {task.spec.name} done")
    order = {(variant, spec.name): i for i, (variant, spec) in enumerate((v, s) for v in VARIANTS for s in everything)}
    console.print(table(sorted(rows, key=lambda row: order[row["variant"], row["name"]])))


if __name__ == "__main__":
    main()
