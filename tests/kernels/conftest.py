"""Every test with the ``backend`` fixture runs once per backend that is available here, under ``strict``; on the CPU
backend once per instruction set that this machine can run.

The Triton backend needs no GPU here: ``triton-sm80`` compiles every kernel for sm_80 and executes its PTX in the
emulator (tests/ptxsim), with races, bounds and uninitialised reads checked; in a process with ``TRITON_INTERPRET=1``
there is ``triton-interpreter`` instead, since Triton decides for one of the two when it is imported. ``cuda-sm80``
executes the PTX of the CUDA kernels in the same way; it needs nvcc.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu import native, weights
from ptq4arvg_kernels.backends.triton import support
from tests.kernels import cuda_cases
from tests.kernels.cpu_cases import running
from tests.kernels.kernel_cases import generator, instruction_sets

PACKAGE = Path(kernels.__file__).parent


if (native.WHY_NOT is not None) and ("PTQ4ARVG_CPU_MODULE" in os.environ or list(PACKAGE.glob("_cpu.*.so"))):
    # Otherwise every test of the CPU backend would be skipped without a word.
    raise RuntimeError(native.WHY_NOT)

if "PTQ4ARVG_CPU_MODULE" in os.environ:
    # Panels in memory of their own instead of pieces of a large buffer, so that sanitizers see an access behind them.
    weights._ARENA.take = lambda size: torch.empty(size, dtype=torch.uint8)  # type: ignore[method-assign]


def pytest_report_header() -> list[str]:
    return [] if cuda_cases.available() else [f"kernels: {cuda_cases.NO_NVCC}"]


def _backends() -> list[str]:
    names = []
    for status in kernels.doctor():
        if status.backend == "triton":
            if support.interpreted():
                names.append("triton-interpreter")
            elif importlib.util.find_spec("triton") is not None:
                names.append("triton-sm80")
        elif status.backend == "cuda":
            if cuda_cases.available():
                names.append("cuda-sm80")
        elif status.available:
            names += [f"cpu-{name}" for name in instruction_sets()] if status.backend == "cpu" else [status.backend]
    return names


def _variant(name: str, variant: str) -> contextlib.AbstractContextManager[Any]:
    """What makes a backend's variant the one that runs."""
    if name == "cpu":
        return running(variant)
    if name == "triton":
        from tests.kernels.triton_cases import device

        return device(record=False)
    if name == "cuda":
        return cuda_cases.device(record=False)
    return contextlib.nullcontext()


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, variant = request.param.partition("-")
    with kernels.use_backend(name, strict=True), _variant(name, variant):
        yield request.param


FEW = 12


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with many parameters, the emulator and the interpreter run one set in five or seven; the others are
    slow tests. The stride has no factor in common with the number of sets, so that every value of every parameter
    occurs."""
    families: dict[tuple[str, ...], list[pytest.Item]] = {}
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("backend", "")  # type: ignore[attr-defined]
        if name and name.startswith(("triton-", "cuda-")):
            families.setdefault((item.path.name, item.originalname, name), []).append(item)  # type: ignore[attr-defined]
    for family in families.values():
        stride = 1 if len(family) <= FEW else 5 if len(family) % 5 else 7
        for i, item in enumerate(family):
            if i % stride:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A backend that declines a shape is skipped with its reason; the reference never declines."""
    try:
        return (yield)
    except kernels.BackendError as error:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get("backend", "reference") == "reference":
            raise
        pytest.skip(str(error))


@pytest.fixture
def gen(request: pytest.FixtureRequest):
    """A generator seeded by the test's name, so that tests do not depend on their order."""
    return generator(sum(map(ord, request.node.name)))
