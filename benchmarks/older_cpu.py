"""Runs a command as if the processor knew nothing newer than AVX2: no AVX-512, VNNI, AMX.

    python -m benchmarks.older_cpu python -m benchmarks.linear_cpu --json out/linear_avx2.json

Every library in the process asks the processor what it can do and is told so (older_cpu.c): this package and all peers
are restricted alike. Clock, caches and memory stay those of the machine, so it stands for an AVX2 machine in what
instructions cost relative to each other, not in absolute times. Linux on x86-64 with ``cpuid_fault`` in /proc/cpuinfo
(Intel since Ivy Bridge), and a C compiler.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("older_cpu.c")


def why_not() -> str | None:
    """Why this machine cannot hide instructions from a process, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"this is {sys.platform} on {platform.machine()}; it needs Linux on x86-64"
    if "cpuid_fault" not in Path("/proc/cpuinfo").read_text():
        return "the processor (or hypervisor) cannot make CPUID fault: no cpuid_fault in /proc/cpuinfo"
    if shutil.which(os.environ.get("CC", "cc")) is None:
        return "there is no C compiler; set CC"
    return None


def run(command: list[str]) -> int:
    """Exit status of ``command``, run with newer instructions hidden.

    Raises:
        RuntimeError: the machine cannot (:func:`why_not`).
        subprocess.CalledProcessError: older_cpu.c does not compile.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"older_cpu: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "older_cpu.so"))
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", library, str(SOURCE)], check=True)
        preload = " ".join(filter(None, [library, os.environ.get("LD_PRELOAD")]))
        return subprocess.run(command, env={**os.environ, "LD_PRELOAD": preload}, check=False).returncode


def main() -> int:
    command = sys.argv[1:]
    if not command:
        print(__doc__)
        return 2
    return run(command)


if __name__ == "__main__":
    sys.exit(main())
