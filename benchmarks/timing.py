"""Timing of contenders that alternate in one process, each over many copies of its weights so that they come from
memory, as they do between two tokens of a generator."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Mapping, Sequence

from .contenders import Call

# Between two contenders: worker threads of the first go on spinning for some milliseconds, those of ONNX Runtime the
# longest, and would take the cores from the second (the figures of OpenVINO after 4 ms were 15 % lower).
SETTLE_S = 0.02
MIN_CALLS = 3
COLD_FACTOR = 4
# Bytes a contender may hold per byte of weight it reads: codes, a library's own copy of them, the packed form.
HELD_FACTOR = 3
MEMORY_LIMIT = 4 << 30


def copies_for(weight_bytes: int, cache_bytes: int, contenders: int) -> int:
    """Copies of a layer whose weights together are ``COLD_FACTOR`` times the last-level cache, as far as the memory
    limit, shared by ``contenders``, allows; at least 2."""
    wanted = -(-COLD_FACTOR * cache_bytes // weight_bytes)
    affordable = MEMORY_LIMIT // (contenders * HELD_FACTOR * weight_bytes)
    return max(2, min(wanted, affordable))


class Rotation:
    """Calls of one contender over its copies, always continuing with the copy that was used longest ago."""

    def __init__(self, calls: Sequence[Call], start: int = 0) -> None:
        self._calls = calls
        self._next = start

    def __len__(self) -> int:
        return len(self._calls)

    def once(self) -> float:
        """Seconds of one call."""
        call = self._calls[self._next % len(self._calls)]
        self._next += 1
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def burst(self, seconds: float) -> list[float]:
        """Seconds of every call of a burst that lasts about ``seconds`` and has at least ``MIN_CALLS`` calls."""
        end = time.perf_counter() + seconds
        times: list[float] = []
        while len(times) < MIN_CALLS or time.perf_counter() < end:
            times.append(self.once())
        return times


class Timings:
    """Seconds per call of one contender: the median of every round, and the fastest call of all."""

    def __init__(self) -> None:
        self.rounds: list[float] = []
        self.best = float("inf")

    def add(self, times: Sequence[float]) -> None:
        self.rounds.append(statistics.median(times))
        self.best = min(self.best, *times)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def alternate(
    rotations: Mapping[str, Rotation], rounds: int, burst_s: float, settle_s: float = SETTLE_S, seed: int = 0
) -> dict[str, Timings]:
    """Run a burst of every contender in every round, in an order drawn anew for each round.

    Every copy runs once before: packing on first use, page faults of a library's buffers and the start of its threads
    are not measured.
    """
    for rotation in rotations.values():
        for _ in range(len(rotation)):
            rotation.once()
    order, chance = list(rotations), random.Random(seed)
    timings = {name: Timings() for name in rotations}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            chance.shuffle(order)
            for name in order:
                time.sleep(settle_s)
                rotations[name].once()  # wakes the threads
                timings[name].add(rotations[name].burst(burst_s))
    finally:
        if collecting:
            gc.enable()
    return timings
