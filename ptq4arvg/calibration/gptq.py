"""Weight rounding with error compensation (GPTQ: Frantar et al., arXiv 2210.17323).

Columns are rounded one after the other; the error of each is spread over the columns that are still free, so that the
layer's output on its calibration inputs changes least. The grid (symmetric, one scale per row) is the same as for
round-to-nearest, so kernels see no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4arvg.calibration.quantizers import symmetric_rows

__all__ = ["compensated_rows"]

BLOCK = 64
DAMPING = 0.01


def compensated_rows(weight: Tensor, bits: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes that minimise the output error on ``inputs``.

    The result is compared with round-to-nearest on the same inputs, row by row, and the better row is kept.

    Args:
        weight: float ``[N, K]``.
        bits: 8 or 6.
        inputs: float ``[n, K]``, rows of the layer's input as it will see them (quantized).

    Returns:
        codes int8 ``[N, K]``, scale float32 ``[N]``.
    """
    limit = 2 ** (bits - 1) - 1
    x = inputs.double()
    hessian = x.T @ x / max(1, len(x))
    power = hessian.diagonal().clone()
    nearest, scale = symmetric_rows(weight, bits, power)
    mean = power.mean()
    if not bool(mean > 0):
        return nearest, scale
    damped = hessian + torch.eye(len(power), dtype=torch.float64) * mean * DAMPING
    order = power.argsort(descending=True, stable=True)
    # Rows of the upper Cholesky factor of the inverse hold what rounding column i asks of the columns after it.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order])), upper=True)
    step = scale.double()
    left = weight.double()[:, order].clone()
    codes = torch.empty_like(left)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = torch.empty(len(left), stop - start, dtype=torch.float64)
        for i in range(start, stop):
            codes[:, i] = (left[:, i] / step).round().clamp(-limit, limit)
            error = (left[:, i] - codes[:, i] * step) / factor[i, i]
            left[:, i:stop] -= error[:, None] * factor[i, i:stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    compensated = torch.empty_like(codes)
    compensated[:, order] = codes

    def output_error(candidate: Tensor) -> Tensor:
        difference = candidate.double() * step[:, None] - weight.double()
        return ((difference @ hessian) * difference).sum(1)

    better = output_error(compensated) < output_error(nearest)
    return torch.where(better[:, None], compensated.to(torch.int8), nearest), scale
