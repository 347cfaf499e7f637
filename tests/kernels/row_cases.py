"""Rows that are normalised, modulated and quantized, and what the codes are measured by, for the backends on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from tests.kernels.kernel_cases import generator, random_table

MODEL_WIDTHS = [768, 1024, 1280, 1408, 1536, 1920, 3200]


def adaln_case(width: int, dtype: torch.dtype, seed: int = 0, count: int = 4) -> tuple[Any, ...]:
    """Arguments of adaln_quant as the models call it: chunks of one modulation, a row map, two positions."""
    gen = generator(seed)
    x = (3 * torch.randn(count, width, generator=gen) + 1).to(dtype)
    scale, _, shift = torch.randn(3, 3 * width, generator=gen).to(dtype).chunk(3, dim=1)
    index = torch.tensor([2, 0, 1, 2], dtype=torch.int32)[:count]
    table = random_table(9, [8, 6], seed, step=0.05)
    return x, "layer", 1e-6, None, None, scale, shift, index, 1.0, table, torch.tensor([6, 1])


def adaln_reference(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    with kernels.use_backend("reference", strict=True):
        return kernels.adaln_quant(*args)


def same_codes(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Codes differ in at most 1e-4 of the places, by one; row sums are those of the codes."""
    wrong = got[0].int() - want[0].int()
    assert (wrong != 0).sum() <= 1e-4 * wrong.numel()
    assert wrong.abs().max() <= 1
    assert torch.equal(got[1], got[0].sum(1, dtype=torch.int32))
