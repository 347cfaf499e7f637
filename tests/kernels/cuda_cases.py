"""Devices for the tests of the CUDA kernels, and their sources."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ptq4arvg_kernels.backends.cuda import native
from tests.ptxsim.cuda_launcher import EmulatedDevice
from tests.ptxsim.cuda_sources import FLAGS, SOURCES
from tests.ptxsim.nvcc import compile_ptx, find_nvcc

__all__ = ["FLAGS", "NO_NVCC", "SOURCES", "available", "device", "planted", "recorded"]

NO_NVCC = "CUDA kernels are not emulated: no nvcc on the path to compile them with"


def available() -> bool:
    """Whether the CUDA kernels can be emulated here: there is an nvcc.

    Raises:
        RuntimeError: there is one, but the compiled module, which every test needs, cannot be imported.
    """
    if find_nvcc() is None:
        return False
    native.module()
    return True


@contextlib.contextmanager
def device(**options: Any) -> Iterator[EmulatedDevice]:
    """The emulator, where kernels run inside the block; the test is skipped where there is no nvcc."""
    if not available():
        pytest.skip(NO_NVCC)
    emulated = EmulatedDevice(**options)
    with native.replace(emulated):
        yield emulated


@contextlib.contextmanager
def recorded() -> Iterator[list[native.Launch]]:
    """Launches are kept and not executed."""
    if not available():
        pytest.skip(NO_NVCC)
    launches: list[native.Launch] = []
    with native.replace(launches.append):
        yield launches


def planted(folder: Path, source: str, *changes: tuple[str, str, str]) -> Callable[[str], str]:
    """An editor of PTX: the kernels of ``source`` with bugs, compiled in ``folder``.

    Args:
        changes: ``(file, old, new)``: in a file of csrc/cuda ``old``, which must be there, becomes ``new``.
    """
    if find_nvcc() is None:
        pytest.skip(NO_NVCC)
    shutil.copytree(SOURCES, folder / "csrc", dirs_exist_ok=True)
    for file, old, new in changes:
        where = folder / "csrc" / "cuda" / file
        text = where.read_text()
        assert old in text, old
        where.write_text(text.replace(old, new))
    ptx = compile_ptx(folder / "csrc" / "cuda" / source, 80, FLAGS)
    return lambda _: ptx
