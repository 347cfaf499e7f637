"""Pieces of attention in kernels: what a block found is a triple (top, weight, sum) per query.

Of the slots it has seen, with logits t in base 2: ``top = max t``, ``weight = sum 2^(t - top)`` and
``sum = sum 2^(t - top) v^``. Triples of disjoint slots merge in any order; the output is ``sum / weight``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .handover import arrived_last
from .rounding import half_range, to_codes

# In place of minus infinity: differences stay finite, and 2^(HIDDEN - top) is 0 for every top that a slot gave.
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def merge_splits(
    top,
    weight,
    total,
    workspace,
    counters,
    pair,
    split,
    pairs,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Hand the triple of this block to the last of the SPLITS blocks of a pair, which merges them.

    ``top, weight [ROWS]`` and ``total [ROWS, LANES]``; returns ``(last, weight, total)``, the sums merged where
    ``last``. See :mod:`.handover`.
    """
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)[None, :]
    # [2, pairs, SPLITS, ROWS] of tops and weights, then [pairs, SPLITS, ROWS, LANES]
    step = pairs * (SPLITS * ROWS)
    first = pair.to(tl.int64) * SPLITS
    totals = workspace + 2 * step
    mine = (first + split) * ROWS + rows
    tl.store(workspace + mine, top)
    tl.store(workspace + step + mine, weight)
    tl.store(totals + mine[:, None] * LANES + lanes, total)
    last = arrived_last(counters + pair, SPLITS)
    if last:
        tops = ()
        best = top
        for i in tl.static_range(SPLITS):
            tops += (tl.load(workspace + (first + i) * ROWS + rows, cache_modifier=".cg"),)
            best = tl.maximum(best, tops[i])
        weight = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, LANES), tl.float32)
        for i in tl.static_range(SPLITS):  # in the order of the splits: the result does not depend on who came last
            theirs = (first + i) * ROWS + rows
            factor = tl.exp2(tops[i] - best)
            weight += tl.load(workspace + step + theirs, cache_modifier=".cg") * factor
            part = tl.load(totals + theirs[:, None] * LANES + lanes, cache_modifier=".cg")
            total += part * factor[:, None]
    return last, weight, total


@triton.jit
def emit(
    weight,
    total,
    out,
    sums,
    out_rows,
    columns,
    mask,
    grid,
    exists,
    DTYPE: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """Store ``sum / weight`` of queries ``[ROWS]``, rounded to DTYPE; with QUANTIZE as codes of that rounded value.

    Args:
        out_rows: row of the output of every query, int64.
        columns: columns of the output ``[1, LANES]``; mask ``[ROWS, LANES]``.
        grid: ``(recip, zq, bits)`` of every query for QUANTIZE, float32 that broadcast against ``[ROWS, LANES]``.
        exists: which queries there are.
        sums: int32 row sums to be added to, or None.
    """
    y = tl.math.div_rn(total, tl.broadcast_to(weight[:, None], total.shape)).to(DTYPE)
    target = out + out_rows[:, None] + columns
    if QUANTIZE:
        codes = to_codes(y.to(tl.float32), grid[0], grid[1], half_range(grid[2]))
        tl.store(target, codes.to(tl.int8), mask=mask)
        if sums is not None:
            tl.atomic_add(sums, tl.sum(tl.where(mask, codes, 0), 1), mask=exists, sem="relaxed")
    else:
        tl.store(target, y, mask=mask)
