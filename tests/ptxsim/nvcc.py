"""CUDA sources to PTX with nvcc."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.ptxsim.errors import PTXError
from tests.ptxsim.launcher import Module, load_ptx


@cache
def find_nvcc() -> str | None:
    """Path of nvcc, None if there is none."""
    return shutil.which("nvcc")


def compile_ptx(source: Path, arch: int = 80, flags: Sequence[str] = ()) -> str:
    """PTX text of a .cu file for sm_<arch>; raises PTXError with the compiler's words if it fails."""
    compiler = find_nvcc()
    if compiler is None:
        raise PTXError(f"no nvcc on the path: {source} cannot be compiled")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernel.ptx")
        command = [compiler, "-ptx", "-O3", "-lineinfo", f"-arch=sm_{arch}", *flags, "-o", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PTXError(f"nvcc failed on {source}:\n{done.stderr}")
        return out.read_text()


def nvcc(source: str | Path, arch: int = 80, flags: Sequence[str] = ()) -> Module:
    """Module of a .cu file."""
    return load_ptx(compile_ptx(Path(source), arch, flags))
