"""Every test with the ``backend`` fixture runs once per backend that is available here, under ``strict``; on the CPU
backend once per instruction set that this machine can run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.cpu import native, weights
from tests.kernels.kernel_cases import generator, instruction_sets

PACKAGE = Path(kernels.__file__).parent


if (native.WHY_NOT is not None) and ("PTQ4ARVG_CPU_MODULE" in os.environ or list(PACKAGE.glob("_cpu.*.so"))):
    # Otherwise every test of the CPU backend would be skipped without a word.
    raise RuntimeError(native.WHY_NOT)

if "PTQ4ARVG_CPU_MODULE" in os.environ:
    # Panels in memory of their own instead of pieces of a large buffer, so that sanitizers see an access behind them.
    weights._ARENA.take = lambda size: torch.empty(size, dtype=torch.uint8)  # type: ignore[method-assign]


def _backends() -> list[str]:
    names = []
    for status in kernels.doctor():
        if status.available:
            names += [f"cpu-{name}" for name in instruction_sets()] if status.backend == "cpu" else [status.backend]
    return names


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, _, instruction_set = request.param.partition("-")
    with kernels.use_backend(name, strict=True):
        if not instruction_set:
            yield request.param
            return
        module = native.module()
        before = module.instruction_set()
        assert module.select(instruction_set)
        try:
            yield request.param
        finally:
            module.select(before)


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
