"""Planted bugs in PTX, and what the emulator counted, for the tests of all kernels that are compiled to PTX."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.ptxsim import Result

BARRIER = re.compile(r"^\s*(?:bar|barrier)\.(?:cta\.)?sync\S*\s.*;.*$", re.MULTILINE)


def barriers(ptx: str) -> int:
    return len(BARRIER.findall(ptx))


def without_barrier(which: int) -> Callable[[str], str]:
    """An editor of PTX that deletes one barrier, counted from 0."""

    def edit(ptx: str) -> str:
        seen = iter(range(len(ptx)))
        return BARRIER.sub(lambda found: "" if next(seen) == which else found.group(), ptx)

    return edit


WIDTHS = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8}


def distinct_bytes(result: Result) -> int:
    """Bytes of global memory that warps asked for; those that lanes of one request share count once."""
    total = 0
    for (_, text), (requests, size, sectors, *_) in result.lines.items():
        if size <= 32 * sectors:
            total += size
        elif sectors == requests and ".v" not in text.split("[")[0]:  # one address
            total += requests * WIDTHS[re.findall(r"\.([bus]\d+|f32)\b", text.split("[")[0])[-1]]
        else:
            total += 32 * sectors
    return total


def sector_efficiency(result: Result) -> float:
    """Share of the bytes of the touched sectors that was asked for, over the requests whose lanes share nothing."""
    size = moved = 0
    for requested in result.lines.values():
        if requested[1] <= 32 * requested[2]:
            size += requested[1]
            moved += 32 * requested[2]
    return size / moved
