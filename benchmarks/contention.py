"""How much of the machine other processes use while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Cores' worth of other processes from which a cell is called disturbed.
DISTURBED = 0.1
# Shorter than this, the kernel's accounting in steps of 10 ms says nothing.
_SHORTEST_S = 0.2
_STAT = Path("/proc/stat")


def busy_seconds(text: str, ticks_per_s: int) -> float:
    """Seconds that all cores together were busy, or taken away by a hypervisor, from the text of ``/proc/stat``."""
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in text.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / ticks_per_s


class Contention:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            text = _STAT.read_text(encoding="ascii")
        except OSError:
            return None
        return time.monotonic(), busy_seconds(text, os.sysconf("SC_CLK_TCK")), time.process_time()

    def others(self) -> float | None:
        """Cores' worth of work of other processes since the start; None where the system does not say, or the time was
        too short to tell."""
        now = self._now()
        if self._start is None or now is None or now[0] - self._start[0] < _SHORTEST_S:
            return None
        wall, busy, own = (after - before for before, after in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / wall)
