"""A pytest plugin that continues an interrupted run: `pytest -p tests.resume --resume FILE`.

Every test that passes is written to FILE at once; the next run leaves those out. The first line of FILE is a
fingerprint of the sources, the interpreter and the installed torch and triton. When it differs the record is worthless
and the run starts from the beginning.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOURCES = ("benchmarks", "csrc", "ptq4arvg", "ptq4arvg_kernels", "tests", "pyproject.toml", "setup.py")
FINGERPRINT = "fingerprint"
PASSED = "passed"


def fingerprint(root: Path) -> str:
    """Hash of everything under `root` that a test result depends on."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("torch", "triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        digest.update(f"{package} {version}\n".encode())
    for source in SOURCES:
        start = root / source
        files = [start] if start.is_file() else sorted(start.rglob("*"))
        for path in files:
            if path.is_file() and "__pycache__" not in path.parts:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


class Record:
    """The tests that passed in FILE, in the run under way and in those before it."""

    def __init__(self, path: Path, current: str) -> None:
        self.path = path
        self.passed_before: set[str] = set()
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [entry for entry in map(_parse, lines) if entry is not None]
        if entries and entries[0].get(FINGERPRINT) == current:
            self.passed_before = {entry[PASSED] for entry in entries if PASSED in entry}
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({FINGERPRINT: current}) + "\n")

    def add(self, nodeid: str) -> None:
        # Starts with a newline, so that a line cut short by an interruption spoils nothing but itself.
        with self.path.open("a") as file:
            file.write("\n" + json.dumps({PASSED: nodeid}) + "\n")


def _parse(line: str) -> dict[str, str] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


class Resume:
    """Leaves out what passed before and, in the process that reports, records what passes."""

    def __init__(self, passed_before: Sequence[str], record: Record | None) -> None:
        self.passed_before = frozenset(passed_before)
        self.record = record
        self.awaiting_teardown: set[str] = set()

    # After pytest's own selection by -m and -k.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.passed_before]
        if done:
            items[:] = [item for item in items if item.nodeid not in self.passed_before]
            config.hook.pytest_deselected(items=done)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        # All workers must collect the same tests, so the list is the one that was read at the start.
        node.workerinput["passed_before"] = sorted(self.passed_before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.record is None or not report.passed:
            return
        if report.when == "call":
            self.awaiting_teardown.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid in self.awaiting_teardown:
            self.record.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        # Shown in pytest's closing line: "3 passed, 40 passed_before in 61.20s".
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if self.record is not None and self.passed_before and reporter is not None:
            reporter.stats["passed_before"] = [SimpleNamespace(nodeid=nodeid) for nodeid in sorted(self.passed_before)]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.passed_before and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--resume", metavar="FILE", help="leave out the tests that FILE records as passed; record new ones there"
    )


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--resume")
    if not file:
        return
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        plugin = Resume(worker["passed_before"], None)
    else:
        record = Record(config.rootpath / file, fingerprint(config.rootpath))
        plugin = Resume(sorted(record.passed_before), record)
    config.pluginmanager.register(plugin, "ptq4arvg-resume")
