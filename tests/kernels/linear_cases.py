"""Every linear operator on one layer, and what its results are measured by, for the backends on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import ptq4arvg_kernels as kernels
from tests.kernels.kernel_cases import LinearCase, generator, random_table

WIDTHS = [(8, [8]), (6, [8]), (6, [6]), (6, [8, 6])]
WIDTH_NAMES = ["W8A8", "W6A8", "W6A6", "W6A6-sinks"]
ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def integers(case: LinearCase) -> np.ndarray:
    return kernels.linear(*case.operands, "none", torch.float32).numpy()


def epilogues(case: LinearCase, dtype: torch.dtype, gating: str = "rows") -> dict[str, Callable[[], Any]]:
    """Every operator on one layer: its name and a call."""
    rows, width = case.codes.shape[0], case.weight.shape[0]
    gen = generator(3)
    residual = torch.randn(rows, width, generator=gen).to(dtype)
    gate = index = None
    if gating != "none":
        # A chunk of one modulation: rows lie 3 * width apart.
        gate = torch.randn(rows if gating == "rows" else 3, 3 * width, generator=gen).to(dtype)[:, width : 2 * width]
        index = None if gating == "rows" else torch.randint(0, 3, (rows,), generator=gen, dtype=torch.int32)
    out_table = random_table(len(case.table), [8, 6], seed=5, step=0.05)
    calls: dict[str, Callable[[], Any]] = {
        f"linear {activation}": lambda activation=activation: kernels.linear(*case.operands, activation, dtype)
        for activation in ("none", "silu", "gelu_erf", "gelu_tanh")
    }
    calls["linear_quant"] = lambda: kernels.linear_quant(*case.operands, "gelu_erf", out_table)
    calls["linear_gate_residual"] = lambda: kernels.linear_gate_residual(*case.operands, gate, index, residual)
    if width % 2 == 0:
        calls["linear_swiglu_quant"] = lambda: kernels.linear_swiglu_quant(*case.operands, out_table)
    return calls


def assert_same(name: str, got: Any, want: Any, float_eps: float) -> None:
    """Bit for bit without an activation; codes within the law, row sums those of the codes; else a few ulp of float32,
    which is at most one of a shorter type.

    Args:
        float_eps: relative distance that activations in float32 may have.
    """
    if isinstance(got, tuple):
        wrong = (got[0].int() - want[0].int()).abs()
        assert (wrong != 0).sum() <= 1e-4 * wrong.numel(), name
        assert wrong.max() <= 1, name
        assert torch.equal(got[1], got[0].sum(1, dtype=torch.int32)), name
    elif name in ("linear none", "linear_gate_residual"):
        assert torch.equal(got, want), name
    else:
        eps = max(float_eps, torch.finfo(want.dtype).eps)
        torch.testing.assert_close(got.double(), want.double(), rtol=eps, atol=2.0**-21, msg=name)
