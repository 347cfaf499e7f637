"""Compiler calls, several at a time, and only those whose files changed since."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError


def call(command: Sequence[str]) -> None:
    """Run a compiler and pass on its words.

    Raises:
        CompileError: it fails; the message has the command and its words.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")
    if done.stdout.strip():
        print(done.stdout.rstrip())


@dataclass(frozen=True)
class Job:
    """A command that makes ``output`` of ``inputs``, and writes what else it read to ``depfile`` (as ``-MD`` does)."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    depfile: Path | None = None

    @property
    def stamp(self) -> Path:
        """The command that made the output: another command makes another output."""
        return self.output.with_name(self.output.name + ".command.json")

    def needed(self) -> bool:
        """Whether the output is missing, older than anything it was made of, or made by another command."""
        try:
            made = self.output.stat().st_mtime_ns
            if json.loads(self.stamp.read_text()) != list(self.command):
                return True
            read = (*self.inputs, *(() if self.depfile is None else dependencies(self.depfile.read_text())))
            return any(path.stat().st_mtime_ns > made for path in read)
        except (OSError, ValueError):
            return True

    def run(self) -> None:
        """Make the output; raises ``CompileError`` as :func:`call` does."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.unlink(missing_ok=True)
        call(self.command)
        self.stamp.write_text(json.dumps(self.command))


def dependencies(depfile: str) -> list[Path]:
    """Files named behind the colon of a make rule; blanks in names are escaped by a backslash."""
    _, _, listed = depfile.replace("\\\n", " ").partition(": ")
    return [Path(name.replace("\0", " ")) for name in listed.replace("\\ ", "\0").split()]


def run_needed(jobs: Sequence[Job], workers: int | None = None) -> int:
    """Run the jobs that are needed, the largest sources first, so that no long one is left to the end; returns how
    many.

    Raises:
        CompileError: of the first that fails; those not yet begun are not run.
    """
    waiting = [job for job in jobs if job.needed()]
    waiting.sort(key=lambda job: -sum(path.stat().st_size for path in job.inputs))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        running = [pool.submit(job.run) for job in waiting]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(waiting)
