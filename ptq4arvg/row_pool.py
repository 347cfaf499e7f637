"""Rows of a comparison side by side, one process with one thread each.

The models are small: two threads inside one operator gain little, and wait for each other whenever the machine has
something else to do. Whole rows are independent.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from ptq4arvg.evaluation import Experiment, Outcome, Row, RowSpec, Settings
from ptq4arvg.scoring import Observations

__all__ = ["Task", "default_jobs", "run_rows"]

MOST_JOBS = 4  # each holds a model, its caches and torch: about 1 GB
POLL_SECONDS = 0.2

Report = Callable[["Task", float, str], None]


@dataclass(frozen=True)
class Task:
    """One row of one variant."""

    variant: str
    spec: RowSpec


def default_jobs() -> int:
    """Processor cores this process may use, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_JOBS)


def run_rows(tasks: Sequence[Task], settings: Settings, jobs: int, report: Report) -> Iterator[tuple[Task, Outcome]]:
    """Run the tasks, ``jobs`` at a time, and yield each with its outcome as it ends. Outcomes do not depend on
    ``jobs``.

    Args:
        report: called in this process with a task, its finished fraction and what it is doing.

    Raises:
        ValueError: fewer than one job.
        OSError: a process was ended from outside, most likely for want of memory.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs == 1:
        for task in tasks:
            yield task, _experiment(task.variant, settings).run(task.spec, functools.partial(report, task))
        return
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    pool = ProcessPoolExecutor(min(jobs, len(tasks)) or 1, context, _start_worker, (messages,))
    try:
        waiting: dict[Future[Any], Task] = {pool.submit(_work, i, task, settings): task for i, task in enumerate(tasks)}
        while waiting:
            done, _ = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            _pass_on(messages, tasks, report)
            for future in done:
                task = waiting.pop(future)
                yield task, _unpack(*future.result())
    except BrokenProcessPool as error:
        raise OSError(
            f"one of {jobs} worker processes ended abruptly, most likely for want of memory; use fewer jobs or images"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=2)
def _experiment(variant: str, settings: Settings) -> Experiment:
    return Experiment(variant, settings)


def _pass_on(messages: Any, tasks: Sequence[Task], report: Report) -> None:
    while True:
        try:
            index, fraction, what = messages.get_nowait()
        except queue.Empty:
            return
        report(tasks[index], fraction, what)


# --- in the worker processes ---

_messages: Any = None


def _start_worker(messages: Any) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(1)


def _work(index: int, task: Task, settings: Settings) -> tuple[Row, Any, Any, Any]:
    """An outcome as NumPy arrays: tensors would travel as open files, which do not outlive the worker."""
    outcome = _experiment(task.variant, settings).run(
        task.spec, lambda fraction, what: _messages.put((index, fraction, what))
    )
    seen = outcome.seen
    return outcome.row, outcome.tokens.numpy(), seen.features.numpy(), seen.correct.numpy()


def _unpack(row: Row, tokens: Any, features: Any, correct: Any) -> Outcome:
    return Outcome(row, torch.from_numpy(tokens), Observations(torch.from_numpy(features), torch.from_numpy(correct)))
