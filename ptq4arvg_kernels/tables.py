"""Position tables: the static quantization parameters of a layer's input, one row per sequence position.

Layout (float32, last dimension 4): ``(delta, recip, zq, bits)`` with ``recip = fp32(1 / delta)`` and the signed zero
point ``zq = z - 2^(bits - 1)``, a small integer that float32 holds exactly. A layer's table is ``[T, 4]``; the tables
of the key/value cache are ``[G, H, 4]`` (group of slots, head) and always 8 bits wide. Source: "Laws of the arithmetic"
in the architecture notes; static token-wise quantization of PTQ4ARVG (arXiv 2601.21238).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import INDEX_DTYPES, check_rows_divisible, check_tensor

ACTIVATION_BITS: tuple[int, ...] = (6, 8)
KV_BITS = 8
DELTA, RECIP, ZQ, BITS = range(4)


def half_range(bits: Tensor) -> Tensor:
    """``2^(bits - 1)`` as int32, for bits that are 6 or 8 in any dtype; codes run from minus this to this minus one."""
    return torch.where(bits == 8, 128, 32).to(torch.int32)


def _rows(what: str, delta: Tensor, zero_point: Tensor, bits: Tensor) -> Tensor:
    """Stack checked columns into ``[..., 4]`` float32 rows; all three inputs share one shape."""
    delta = delta.to(torch.float32)
    bad = ~(torch.isfinite(delta) & (delta > 0))
    if bool(bad.any()):
        raise ValueError(
            f"{what}: delta contains {float(delta[bad][0])}; a step size must be finite and > 0: a group whose "
            "calibration saw only zeros needs a fallback such as the smallest delta of the layer"
        )
    recip = 1.0 / delta
    if not bool(torch.isfinite(recip).all()):
        smallest = float(delta.min())
        raise ValueError(f"{what}: 1/delta overflows float32 for delta = {smallest}; clamp the step size from below")
    known = torch.zeros_like(bits, dtype=torch.bool)
    for allowed in ACTIVATION_BITS:
        known |= bits == allowed
    if not bool(known.all()):
        raise ValueError(f"{what}: bits contains {float(bits[~known][0])}; supported activation bits are 6 and 8")
    half = half_range(bits)
    top = 2 * half - 1
    outside = (zero_point < 0) | (zero_point > top) | (zero_point != torch.round(zero_point.to(torch.float64)))
    if bool(outside.any()):
        raise ValueError(
            f"{what}: zero_point contains {float(zero_point[outside][0])}; it must be an integer from 0 to "
            f"{int(top[outside][0])}: extend the calibrated range so that it contains 0, and round"
        )
    zq = zero_point.to(torch.int32) - half
    return torch.stack([delta, recip, zq.to(torch.float32), bits.to(torch.float32)], dim=-1)


def make_table(
    delta: Tensor | Sequence[float] | float,
    zero_point: Tensor | Sequence[int] | int,
    bits: Tensor | Sequence[int] | int,
    group_of_position: Tensor | Sequence[int],
) -> Tensor:
    """Build the position table of a layer input.

    Args:
        delta: step size per group, ``[G]`` (or a scalar: one group); stored as float32.
        zero_point: unsigned zero point z per group, an integer ``0 <= z <= 2^bits - 1``; scalars broadcast over G.
        bits: 6 or 8 per group; scalars broadcast over G.
        group_of_position: group of every sequence position, ``[T]`` integers in ``[0, G)``.

    Returns:
        float32 ``[T, 4]`` on the device of ``delta``.

    Raises:
        ValueError: a parameter breaks the law, or the sizes disagree.
        IndexError: a position names a group that does not exist.
    """
    steps = torch.as_tensor(delta).reshape(-1)
    points = torch.as_tensor(zero_point, device=steps.device).reshape(-1)
    widths = torch.as_tensor(bits, device=steps.device).reshape(-1)
    groups = torch.as_tensor(group_of_position, device=steps.device)
    count = steps.numel()
    for name, values in (("zero_point", points), ("bits", widths)):
        if values.numel() not in (1, count):
            raise ValueError(f"make_table: {name} has {values.numel()} entries for {count} groups; pass one per group")
    if groups.dim() != 1 or groups.is_floating_point():
        raise ValueError(
            f"make_table: group_of_position is {groups.dtype} with shape {tuple(groups.shape)}; pass a 1-D integer list"
        )
    if groups.numel() and (int(groups.min()) < 0 or int(groups.max()) >= count):
        bad = int(groups.min()) if int(groups.min()) < 0 else int(groups.max())
        raise IndexError(f"make_table: group_of_position contains {bad}, valid groups are 0 to {count - 1}")
    rows = _rows("make_table", steps, points.expand(count), widths.expand(count))
    return rows[groups.to(torch.int64)].contiguous()


def make_kv_table(delta: Tensor, zero_point: Tensor) -> Tensor:
    """Build a table of the key/value cache from ``delta [G, H]`` and ``zero_point [G, H]`` (0 to 255): ``[G, H, 4]``.

    Raises:
        ValueError: a parameter breaks the law, or the shapes are not the same ``[G, H]``.
    """
    if delta.dim() != 2 or delta.shape != zero_point.shape:
        raise ValueError(
            f"make_kv_table: delta has shape {tuple(delta.shape)} and zero_point {tuple(zero_point.shape)}; "
            "both must be [groups, heads]"
        )
    bits = torch.full(delta.shape, KV_BITS, dtype=torch.int64, device=delta.device)
    return _rows("make_kv_table", delta, zero_point.to(delta.device), bits).contiguous()


def row_parameters(table: Tensor, positions: Tensor, rows: int) -> Tensor:
    """Expand a table to one row per row of an operand: ``result[i] = table[positions[i % P]]``, float32 ``[M, 4]``.

    Args:
        table: float32 ``[T, 4]``.
        positions: int32 or int64 ``[P]``; P must divide ``rows`` (M).
        rows: M, the number of rows of the operand, laid out batch-major.

    Raises:
        ValueError: M is not a multiple of P, or a shape is wrong. Positions outside the table raise an ``IndexError``
            from the gather; operators check them first and say more.
    """
    check_tensor("row_parameters", "table", table, (torch.float32,), (None, 4), "[T, 4]")
    check_tensor("row_parameters", "positions", positions, INDEX_DTYPES, (None,), "[P]")
    check_rows_divisible("row_parameters", rows, positions.shape[0])
    per_position = table.index_select(0, positions)
    period = positions.shape[0]
    return per_position if period == 0 else per_position.repeat(rows // period, 1)
