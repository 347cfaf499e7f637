"""Benchmarks as on an older processor: what it hides is hidden from every library, and failures are told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import older_cpu

REASON = older_cpu.why_not()
needs_faulting = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ASK = """
import torch
from ptq4arvg_kernels.backends.cpu import native
usable = [name for name, _, supported in native.module().instruction_sets() if supported]
print(torch.backends.cpu.get_cpu_capability(), *usable)
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", "benchmarks.older_cpu", *command]
    return subprocess.run(full, capture_output=True, text=True, check=False)


@needs_faulting
def test_nothing_newer_than_avx2_is_seen() -> None:
    seen = run(sys.executable, "-c", ASK)
    assert seen.returncode == 0, seen.stderr
    capability, *sets = seen.stdout.split()
    assert capability in ("AVX2", "DEFAULT")
    assert not {"avx512vnni", "amx"} & set(sets)
    assert "portable" in sets


@needs_faulting
def test_threads_and_children_see_the_same() -> None:
    program = f"""
import subprocess, sys, threading
code = {ASK!r}
thread = threading.Thread(target=lambda: subprocess.run([sys.executable, "-c", code], check=True))
thread.start()
thread.join()
"""
    seen = run(sys.executable, "-c", program)
    assert seen.returncode == 0, seen.stderr
    assert "AVX512" not in seen.stdout
    assert "amx" not in seen.stdout.split()


@needs_faulting
def test_a_crash_stays_a_crash_and_a_status_a_status() -> None:
    crash = run(sys.executable, "-c", "import ctypes; ctypes.string_at(8)")
    assert crash.returncode not in (0, 2)
    assert run(sys.executable, "-c", "raise SystemExit(7)").returncode == 7


def test_a_machine_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(older_cpu.platform, "machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match="aarch64; it needs Linux on x86-64"):
        older_cpu.run(["true"])
