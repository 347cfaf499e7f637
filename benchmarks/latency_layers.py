"""Timing of single layers on a GPU with weights that come from memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .contenders import Call, Contender
from .linear_measure import MAX_ERROR
from .shapes import LayerShape
from .timers import Timer

# Weights of all copies together, in last-level caches: none is left when its turn comes again.
COLD_FACTOR = 5
# Calls in one replay, at least: a replay's own overhead is spread over them.
MIN_CALLS = 20
MEMORY_LIMIT = 8 << 30


def copies_for(weight_bytes: int, cache_bytes: int) -> int:
    """Copies of a layer that one replay runs through.

    Raises:
        ValueError: they would not fit into the memory limit.
    """
    copies = max(MIN_CALLS, -(-COLD_FACTOR * cache_bytes // weight_bytes))
    if copies * weight_bytes > MEMORY_LIMIT:
        raise ValueError(f"{copies} copies of {weight_bytes >> 20} MiB exceed {MEMORY_LIMIT >> 30} GiB")
    return copies


def _check(name: str, calls: Sequence[Call], expected: torch.Tensor) -> None:
    """The last copy computes what it should: its rows are rolled, so that shared weights are found out."""
    got = calls[-1]().float()
    wanted = expected.roll(len(calls) - 1, 1)
    error = float((got - wanted).norm() / wanted.norm())
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{name} does not compute this layer: its relative error is {error:.3g}")


def measure_shape(
    shape: LayerShape, counts: Sequence[int], contenders: Mapping[str, Contender], timer: Timer, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields a row per M and contender: seconds of a call, median over ``repeats`` replays of all copies.

    Contenders are measured one after the other, each with copies of its own that are freed before the next.

    Raises:
        RuntimeError: a contender's result is not the layer's.
    """
    device = timer.device
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.n, shape.k, generator=generator).to(device) / shape.k**0.5
    bias = torch.randn(shape.n, generator=generator).to(device)
    inputs = {m: torch.randn(m, shape.k, generator=generator).to(device) for m in counts}
    for name, contender in contenders.items():
        size = contender.weight_bytes(shape.n, shape.k)
        layers = contender.layers(weight, bias, copies_for(size, timer.cache_bytes))
        dtype: torch.dtype = contender.dtype  # type: ignore[attr-defined]
        for m, x in inputs.items():
            expected = torch.nn.functional.linear(x, weight, bias)
            rows, out = x.to(dtype), torch.empty(m, shape.n, dtype=dtype, device=device)
            calls = [layer(rows, out) for layer in layers]
            _check(name, calls, expected)

            def run(calls: Sequence[Call] = calls) -> None:
                for call in calls:
                    call()

            times = [seconds / len(calls) for seconds in timer.seconds(timer.capture(run), repeats)]
            seconds = statistics.median(times)
            yield {
                "layers": list(shape.users),
                "kind": shape.kind,
                "N": shape.n,
                "K": shape.k,
                "M": m,
                "contender": name,
                "seconds": seconds,
                "round_seconds": times,
                "tops": 2 * m * shape.n * shape.k / seconds / 1e12,
                "bytes": size + m * (shape.k + shape.n) * dtype.itemsize,
                "gb_s": (size + m * (shape.k + shape.n) * dtype.itemsize) / seconds / 1e9,
                "copies": len(calls),
            }
        del layers
        gc.collect()
