"""Modules of the CUDA sources, compiled once per session; without nvcc their tests are skipped and say so."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.ptxsim import Module, load_ptx
from tests.ptxsim.nvcc import compile_ptx, find_nvcc

TRITON = importlib.util.find_spec("triton") is not None
collect_ignore = [] if TRITON else ["test_consistency.py", "test_triton.py", "test_triton_launcher.py"]
SOURCES = Path(__file__).parent / "sources"
Cuda = Callable[..., Module]


def pytest_report_header() -> list[str]:
    return [] if TRITON else ["ptxsim: Triton kernels are not emulated, since Triton is not installed"]


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Cuda:
    """cuda(name, arch=80): the module of sources/<name>.cu."""
    if find_nvcc() is None:
        pytest.skip("CUDA kernels are not emulated: no nvcc on the path to compile them with")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ptx"  # one for all workers
    folder.mkdir(exist_ok=True)

    @cache
    def load(name: str, arch: int = 80) -> Module:
        path = folder / f"{name}.sm{arch}.ptx"
        if not path.exists():
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(compile_ptx(SOURCES / f"{name}.cu", arch))
            new.replace(path)
        return load_ptx(path)

    return load
