"""Measuring the cells of a benchmark of linear layers: one shape after another, all contenders in alternation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .contenders import Call, Contender, Layer
from .contention import Contention
from .shapes import LayerShape
from .timing import SETTLE_S, Rotation, Timings, alternate, copies_for

# Share of the time limit spent in bursts; building and compiling the copies takes the rest.
BURST_SHARE = 0.6
BURST_S = (0.002, 0.03)
# Relative error of a result, above which a contender does not compute this layer. 6-bit codes have about 0.05.
MAX_ERROR = 0.1


def burst_seconds(minutes: float, cells: int, contenders: int, rounds: int) -> float:
    """How long a contender may run per round, so that all cells end within the limit."""
    share = BURST_SHARE * 60 * minutes / (cells * contenders * rounds) - SETTLE_S
    return min(max(share, BURST_S[0]), BURST_S[1])


def _bound(name: str, layers: Sequence[Layer], x: Tensor, expected: Tensor) -> Rotation:
    y = torch.empty_like(expected)
    calls: list[Call] = [layer(x, y) for layer in layers]
    # The last copy: its rows are rolled, so that a library that shares the weights of equal layers is found out.
    got = calls[-1]()
    error = float((got - expected.roll(len(calls) - 1, 1)).norm() / expected.norm())
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{name} does not compute this layer: its relative error is {error:.3g}")
    return Rotation(calls)


def _timings(
    layers: Mapping[str, Sequence[Layer]], x: Tensor, expected: Tensor, rounds: int, burst_s: float, settle_s: float
) -> tuple[dict[str, Timings], float | None]:
    """Times by contender, and the cores' worth of other processes meanwhile."""
    # What is bound to these rows (compiled models among it) is freed on return, before the next M is bound.
    rotations = {name: _bound(name, copies, x, expected) for name, copies in layers.items()}
    contention = Contention()
    timings = alternate(rotations, rounds, burst_s, settle_s)
    return timings, contention.others()


def _row(shape: LayerShape, m: int, name: str, weight_bytes: int, copies: int, times: Timings) -> dict[str, Any]:
    return {
        "layers": list(shape.users),
        "kind": shape.kind,
        "N": shape.n,
        "K": shape.k,
        "M": m,
        "contender": name,
        "seconds": times.median,
        "best_seconds": times.best,
        "round_seconds": times.rounds,
        "gops": 2 * m * shape.n * shape.k / times.median / 1e9,
        "weight_bytes": weight_bytes,
        "weight_gb_s": weight_bytes / times.median / 1e9,
        "copies": copies,
    }


def measure_shape(
    shape: LayerShape,
    counts: Sequence[int],
    contenders: Mapping[str, Contender],
    rounds: int,
    burst_s: float,
    cache_bytes: int,
    settle_s: float = SETTLE_S,
) -> Iterator[list[dict[str, Any]]]:
    """Yields, for every M, one row per contender: times of this shape, and what follows from them.

    Raises:
        RuntimeError: a contender's result is not the layer's.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.n, shape.k, generator=generator) / shape.k**0.5
    bias = torch.randn(shape.n, generator=generator)
    layers = {}
    for name, contender in contenders.items():
        copies = copies_for(contender.weight_bytes(shape.n, shape.k), cache_bytes, len(contenders))
        layers[name] = contender.layers(weight, bias, copies)
    for m in counts:
        x = torch.randn(m, shape.k, generator=generator)
        expected = torch.nn.functional.linear(x, weight, bias)
        timings, others = _timings(layers, x, expected, rounds, burst_s, settle_s)
        yield [
            _row(shape, m, name, contenders[name].weight_bytes(shape.n, shape.k), len(layers[name]), times)
            | {"others": others}
            for name, times in timings.items()
        ]
