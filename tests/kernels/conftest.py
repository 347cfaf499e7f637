"""Every test with the ``backend`` fixture runs once per backend that is available here, under ``strict``."""

from collections.abc import Iterator

import pytest

import ptq4arvg_kernels as kernels
from tests.kernels.kernel_cases import generator


@pytest.fixture(params=[status.backend for status in kernels.doctor() if status.available])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use_backend(request.param, strict=True):
        yield request.param


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
