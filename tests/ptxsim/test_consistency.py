"""Result, counters and findings do not depend on the batch size, the schedule or the number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ptxsim import triton_cases as cases
from tests.ptxsim.triton_launcher import compile_kernel

pytestmark = cases.COMPILED_ONLY

ROWS, COLUMNS, INNER = 65, 70, 80
WAYS: list[dict[str, Any]] = [
    {"batch": 1},
    {"batch": 4},
    {"workers": 2},
    {"schedule": "warp_serial"},
    {"schedule": "warp_reverse", "batch": 2},
    {"schedule": "random", "batch": 1, "seed": 7},
    {"hazards": "off"},
]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_way_to_run_a_kernel_agrees(capability: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(-128, 128, (n, INNER)).astype(np.int8)) for n in (ROWS, COLUMNS))
    c = torch.zeros(ROWS, COLUMNS, dtype=torch.int32)
    arguments = {"a": a, "b": b, "c": c, "M": ROWS, "N": COLUMNS, "K": INNER, "BM": 64, "BN": 64, "BK": 64}
    compiled, _ = compile_kernel(cases.int8_gemm, arguments, 4, 3, capability)

    def metrics(**options: Any) -> dict[str, Any]:
        c.zero_()
        result = compiled.launch((2, 2), [a, b, c, ROWS, COLUMNS, INNER], **options)
        assert np.array_equal(c.numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)
        return {name: value for name, value in result.metrics().items() if name != "seconds"}

    base = metrics()
    for options in WAYS:
        assert metrics(**options) == base, options
