"""Data-dependent checks, for backends that can afford to read the data (the reference and the CPU backends).

A backend whose data lives on another device would have to synchronise for these; it documents what it does instead.
They must never be called from traced code or from a fake kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tables import half_range


def check_index(op: str, name: str, index: Tensor, size: int, remedy: str, first: int = 0) -> None:
    """Raise ``IndexError`` unless every entry of ``index`` lies in ``[first, first + size)``."""
    if index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    last = first + size - 1
    if low < first or high > last:
        bad = low if low < first else high
        raise IndexError(f"{op}: {name} contains {bad}, valid values are {first} to {last}; {remedy}")


def check_positions(op: str, positions: Tensor, length: int, table: str = "table") -> None:
    """Raise ``IndexError`` unless every position has a row in a table of ``length`` rows."""
    check_index(
        op,
        "positions",
        positions,
        length,
        f"{table} has {length} rows, one per sequence position: pass positions inside the sequence, or a {table} that "
        "was calibrated for the longer one",
    )


def check_distinct(op: str, positions: Tensor) -> None:
    """Raise ``ValueError`` if a position occurs twice (two rows would then write one cache slot)."""
    if positions.unique().numel() != positions.numel():
        raise ValueError(
            f"{op}: positions {positions.tolist()} contains a position twice, so two rows would write the same cache "
            "slot; pass each position once (the batch is the leading dimension of the cache)"
        )


def check_finite(op: str, values: Tensor) -> None:
    """Raise ``ValueError`` if a value about to be quantized is NaN or infinite.

    ``clamp`` would turn either into a valid code and the damage would only be seen in the image. A finite value outside
    the calibrated range is not an error: it saturates, as the law says.
    """
    if math.isfinite(float(values.sum())):  # one pass; a sum of finite values may overflow, hence the second look
        return
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    where = [int(i) for i in (~finite).nonzero()[0]]
    value = float(values[tuple(where)])
    count = int((~finite).sum())
    raise ValueError(
        f"{op}: cannot quantize {value} (first of {count} non-finite values, at index {where}); an overflow of float16 "
        "or an uninitialised buffer upstream is the usual cause: run the model in bfloat16 or float32 to find it"
    )


def check_quant_rows(op: str, rows: Tensor, allowed_bits: tuple[int, ...], name: str) -> None:
    """Raise ``ValueError`` if rows ``[..., 4]`` of a table do not obey the law (see :mod:`ptq4arvg_kernels.tables`)."""
    if rows.numel() == 0:
        return
    delta, recip, zq, bits = rows.unbind(-1)
    known = torch.zeros_like(bits, dtype=torch.bool)
    for allowed in allowed_bits:
        known |= bits == allowed
    half = half_range(bits)
    good = (
        known
        & torch.isfinite(delta)
        & (delta > 0)
        & (recip == 1.0 / delta)
        & (zq == torch.round(zq))
        & (zq >= -half)
        & (zq <= half - 1)
    )
    if not bool(good.all()):
        bad = rows[~good][0].tolist()
        raise ValueError(
            f"{op}: {name} has a row (delta, recip, zq, bits) = {bad}; expected delta > 0, recip = fp32(1/delta), an "
            f"integer -2^(bits-1) <= zq <= 2^(bits-1) - 1 and bits in {allowed_bits}: build it with "
            "ptq4arvg_kernels.tables"
        )


def check_code_range(op: str, codes: Tensor, low: Tensor, high: Tensor) -> None:
    """Raise ``ValueError`` if a row of ``codes [M, K]`` leaves the grid of its position (``low``, ``high``: [M, 1]).

    Kernels choose their accumulation from the bits in the table, so a code outside the grid would overflow silently.
    """
    if codes.numel() == 0:
        return
    smallest, largest = codes.amin(1, keepdim=True), codes.amax(1, keepdim=True)
    bad = (smallest < low) | (largest > high)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{op}: row {row} holds codes from {int(smallest[row])} to {int(largest[row])}, but the grid of its "
            f"position is {int(low[row])} to {int(high[row])}; quantize the input with the same table and positions"
        )


def check_row_sums(op: str, codes: Tensor, row_sums: Tensor) -> None:
    """Raise ``ValueError`` unless ``row_sums`` are the sums of ``codes``; some kernels rely on them, others do not."""
    expected = codes.sum(1, dtype=torch.int32)
    wrong = expected != row_sums
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{op}: row_sums[{row}] is {int(row_sums[row])} but the codes of that row sum to {int(expected[row])}; "
            "pass the row_sums that came with the codes"
        )
