"""Metadata checks (dtype, shape, device) shared by the real and the fake implementation of every operator.

Nothing here reads tensor data, so all of it runs on fake tensors and under CUDA graph capture. Checks that must read
data (is this position inside the table?) live in :mod:`ptq4arvg_kernels.value_checks` and belong to the backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES: tuple[torch.dtype, ...] = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ``TypeError`` unless ``tensor.dtype`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} has dtype {found}, expected {_names(allowed)}; convert it with .to(...)")


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | None], layout: str) -> None:
    """Raise ``ValueError`` unless the shape matches ``expected`` (``None`` matches any size).

    ``layout`` names the dimensions for the reader of the message, e.g. ``"[M, K]"``.
    """
    if tensor.dim() != len(expected):
        raise ValueError(
            f"{op}: {name} has {tensor.dim()} dimensions (shape {tuple(tensor.shape)}), expected {layout}; reshape it"
        )
    for axis, size in enumerate(expected):
        if size is not None and tensor.shape[axis] != size:
            raise ValueError(
                f"{op}: {name} has size {tensor.shape[axis]} in dimension {axis} (shape {tuple(tensor.shape)}), "
                f"expected {size}; its layout is {layout}"
            )


def check_tensor(
    op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype], expected: Sequence[int | None], layout: str
) -> None:
    """:func:`check_dtype` and :func:`check_shape` in one call."""
    check_dtype(op, name, tensor, allowed)
    check_shape(op, name, tensor, expected, layout)


def check_same_device(op: str, reference: str, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all tensors share the device of ``tensors[reference]``; ``None`` is skipped."""
    anchor = tensors[reference]
    if anchor is None:
        raise ValueError(f"{op}: {reference} is required")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {reference} is on {anchor.device}; "
                f"move it with .to({str(anchor.device)!r})"
            )


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_rows_divisible(op: str, rows: int, period: int) -> None:
    """Raise ``ValueError`` unless M rows hold a whole number of periods of P positions (rows are batch-major)."""
    if period == 0:
        if rows != 0:
            raise ValueError(f"{op}: positions is empty but there are M = {rows} rows; pass one position per row")
    elif rows % period != 0:
        raise ValueError(
            f"{op}: M = {rows} rows is not a multiple of P = {period} positions; rows are batch-major, so row i sits "
            f"at positions[i % P]: pass the positions of one sequence and a whole number of sequences"
        )
