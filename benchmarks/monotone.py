"""Whether more rows ever take less time: t(M) of our kernels for every M, and its largest drop."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from .contenders import Contender
from .shapes import LayerShape
from .timing import Rotation, Timings, copies_for

# A burst is short, because neighbours in M are compared and should see the same state of the machine.
BURST_S = 0.004


def worst_drop(rows: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """The largest t(M) / t(M') over M < M', with its pair; a ratio up to 1 means that t never falls.

    Raises:
        ValueError: fewer than two row counts, or they do not increase.
    """
    if len(rows) < 2 or any(a >= b for a, b in pairwise(rows)):
        raise ValueError(f"row counts must increase and be at least two, got {list(rows)}")
    ratio, m, later = max((seconds[i] / seconds[j], rows[i], rows[j]) for j in range(1, len(rows)) for i in range(j))
    return {"ratio": ratio, "rows": [m, later]}


def measure_monotone(
    contenders: Mapping[str, Contender], shape: LayerShape, rows: Sequence[int], rounds: int, cache_bytes: int
) -> dict[str, Any]:
    """Median time of every kernel at every M; in each round all pairs of kernel and M follow in a new order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.n, shape.k, generator=generator) / shape.k**0.5
    bias = torch.randn(shape.n, generator=generator)
    x = torch.randn(max(rows), shape.k, generator=generator)
    y = torch.empty(max(rows), shape.n)
    runs: dict[tuple[str, int], Rotation] = {}
    chance = random.Random(0)
    for name, contender in contenders.items():
        copies = copies_for(contender.weight_bytes(shape.n, shape.k), cache_bytes, len(contenders))
        layers = contender.layers(weight, bias, copies)
        for m in rows:
            # Starting anywhere, a run does not find the copies in cache that the run before it used.
            runs[name, m] = Rotation([layer(x[:m], y[:m]) for layer in layers], chance.randrange(copies))
        for _ in layers:
            runs[name, rows[0]].once()  # packs every copy
    timings = {key: Timings() for key in runs}
    order = list(runs)
    for _ in range(rounds):
        chance.shuffle(order)
        for key in order:
            runs[key].once()
            timings[key].add(runs[key].burst(BURST_S))
    seconds = {name: [timings[name, m].median for m in rows] for name in contenders}
    return {
        "shape": shape.name,
        "rows": list(rows),
        "seconds": seconds,
        "best_seconds": {name: [timings[name, m].best for m in rows] for name in contenders},
        "worst": {name: worst_drop(rows, seconds[name]) for name in contenders},
    }
