"""Memory that torch allocates per decode step once everything is warm."""

from __future__ import annotations

import contextlib
from typing import Any

from torch.profiler import ProfilerActivity, profile

from .decode_steps import Stop, classes_of, run_length


def memory_events(profiler: Any) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) that the profiler saw."""
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def allocations(model: Any, batch: int, steps: int | None = None) -> dict[str, Any]:
    """Allocations and net bytes of ``steps`` steps in the middle of an image, per step: all that ``generate`` does.

    By default so many steps that the modulation of a chunk of positions is computed among them.
    """
    tokens = model.config.tokens
    steps = min(tokens // 2, steps or run_length(model, batch) + 2)
    first = (tokens - steps) // 2
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def watch(step: int) -> None:
        if step == first:
            profiler.start()
        if step == first + steps:
            profiler.stop()
            raise Stop

    with contextlib.suppress(Stop):
        model.generate(classes_of(model, batch), 0, progress=watch)
    events = memory_events(profiler)
    return {
        "batch": batch,
        "steps": steps,
        "allocations_per_step": sum(size > 0 for size in events) / steps,
        "net_bytes_per_step": sum(events) / steps,
    }
