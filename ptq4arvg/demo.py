"""The demonstration: quantize the bundled model in several ways, let every result draw, and print one table.

Writes ``report.json`` and ``images.png``. Needs neither a GPU nor the dataset.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ptq4arvg import __version__
from ptq4arvg.demo_picture import Panel, Strip, draw_picture
from ptq4arvg.evaluation import COMPARISON, Outcome, Row, Settings
from ptq4arvg.files import write_json
from ptq4arvg.models.bundled import CLASS_NAMES, VARIANTS, load_reference, load_scorer
from ptq4arvg.row_pool import Task, default_jobs, run_rows
from ptq4arvg.scoring import Scorer

__all__ = ["demo", "table"]

PER_CLASS = 2  # pictures of each class in a row of the sheet

TITLES = {
    "bundled": ("The trained model", "as it ships; the same random numbers in every row"),
    "stress": (
        "Its stress variant",
        "the same function, with channel outliers (lognormal gains, 4σ offsets) folded into every norm → linear pair",
    ),
}


def _percent(value: float) -> str:
    return "100%" if value == 1 else f"{value:.1%}"


def table(rows: list[Row]) -> Table:
    """The rows as a table for the terminal, grouped by variant; fits into 80 columns."""
    result = Table(
        title="Quantized image generation: small RAR, Fashion-MNIST",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("model", no_wrap=True)
    result.add_column("kind", no_wrap=True)
    for header in ("MB", "SQNR", "KL", "top-1", "class", "Fréchet", "tok/s"):
        result.add_column(header, justify="right", no_wrap=True)
    variant = ""
    for row in rows:
        if row.variant != variant:
            if variant:
                result.add_section()
            variant = row.variant
            result.add_row(f"[bold]{variant}[/bold]")
        result.add_row(
            f" {row.name}",
            "integer" if row.integer else ("float" if row.act_bits == 16 else "simulated"),
            "–" if row.size_mb is None else f"{row.size_mb:.2f}",
            "–" if row.logit_sqnr_db is None else f"{row.logit_sqnr_db:.1f}",
            f"{row.kl_nats:.3f}",
            _percent(row.top1_agreement),
            _percent(row.class_accuracy),
            f"{row.frechet:.3f}",
            f"{row.tokens_per_s:.0f}",
        )
    return result


def _strip(outcome: Outcome, scorer: Scorer) -> Strip:
    row = outcome.row
    classes = len(CLASS_NAMES)
    pictures = scorer.decode(outcome.tokens[: classes * PER_CLASS])
    pictures = pictures.view(PER_CLASS, classes, *pictures.shape[-2:]).transpose(0, 1)
    sqnr = "" if row.logit_sqnr_db is None else f"logits {row.logit_sqnr_db:.1f} dB\n"
    return Strip(row.name, f"{sqnr}class {row.class_accuracy:.1%}\nFréchet {row.frechet:.2f}", pictures)


class _Bars:
    """One bar for the whole, and one for every row that is being worked on."""

    def __init__(self, progress: Progress, rows: int) -> None:
        self.progress = progress
        self.whole = progress.add_task("[bold]all rows", total=float(rows))
        self.bars: dict[Task, TaskID] = {}
        self.done: dict[Task, float] = {}

    def show(self, task: Task, fraction: float, what: str) -> None:
        label = f"{task.variant}: {task.spec.name}, {what}"
        if task not in self.bars:
            self.bars[task] = self.progress.add_task(label, total=1.0)
        self.done[task] = fraction
        self.progress.update(self.bars[task], completed=fraction, description=label)
        self.progress.update(self.whole, completed=sum(self.done.values()))

    def finish(self, task: Task) -> None:
        self.show(task, 1.0, "done")


def demo(out: Path, settings: Settings, jobs: int | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run the comparison on both variants, print the table, write ``report.json`` and ``images.png`` to ``out``.

    Args:
        jobs: rows worked on at the same time, one thread each; None for one per processor core.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: fewer pictures than one row of the sheet shows.
    """
    least = PER_CLASS * len(CLASS_NAMES)
    if settings.images < least:
        raise ValueError(
            f"{settings.images} images are too few: the picture shows {least} of every row; ask for at least that many"
        )
    console = console or Console()
    jobs = default_jobs() if jobs is None else jobs
    started = time.perf_counter()
    scorer, reference = load_scorer(), load_reference()
    tasks = [Task(variant, spec) for variant in VARIANTS for spec in COMPARISON]
    found: dict[Task, Outcome] = {}
    columns = (TextColumn("{task.description:44}"), BarColumn(None), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, expand=True) as progress:
        bars = _Bars(progress, len(tasks))
        for task, outcome in run_rows(tasks, settings, jobs, bars.show):
            found[task] = outcome
            bars.finish(task)
    outcomes = [found[task] for task in tasks]
    rows = [outcome.row for outcome in outcomes]
    seconds = time.perf_counter() - started
    report = {
        "version": __version__,
        "settings": settings.to_dict(),
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "reference": reference.figures,
        "rows": [row.to_dict() for row in rows],
    }
    panels = [
        Panel(*TITLES[variant], [_strip(outcome, scorer) for outcome in outcomes if outcome.row.variant == variant])
        for variant in VARIANTS
    ]
    draw_picture(out / "images.png", panels, CLASS_NAMES)
    write_json(out / "report.json", report)
    console.print(table(rows))
    figures = reference.figures
    console.print(
        f"[dim]{settings.images} pictures per row. SQNR (dB), KL (nats), top-1: logits against FP on held-out samples. "
        f"class: pictures that the classifier ({figures['classifier_test_accuracy']:.1%} on real ones) assigns to the "
        f"class asked for. Fréchet: to the test set; the tokenizer's own reconstructions of it have "
        f"{figures['reconstruction_frechet']:.3f}. simulated: fake-quantized in floating point, no integer checkpoint "
        "exists.[/dim]"
    )
    console.print(f"{seconds:.0f} s; pictures in {out / 'images.png'}, figures in {out / 'report.json'}")
    return report
