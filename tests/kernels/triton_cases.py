"""Devices, planted bugs and counters for the tests of the Triton kernels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ptq4arvg_kernels.backends.triton import launch, support
from tests.ptxsim import Result
from tests.ptxsim.triton_launcher import EmulatedDevice, compile_kernel


@contextlib.contextmanager
def rounding_interpreter() -> Iterator[None]:
    """Triton's interpreter with conversions from float32 to bfloat16 that round, as hardware does: it truncates."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(np.array(data, np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield


@contextlib.contextmanager
def device(**options: Any) -> Iterator[EmulatedDevice | None]:
    """Where kernels run inside the block: the emulator with ``options``, or (None) Triton's interpreter."""
    if support.interpreted():
        with rounding_interpreter():
            yield None
        return
    emulated = EmulatedDevice(**options)
    with launch.replace(emulated):
        yield emulated


@contextlib.contextmanager
def recorded() -> Iterator[list[launch.Launch]]:
    """Launches are kept and not executed."""
    launches: list[launch.Launch] = []
    with launch.replace(launches.append):
        yield launches


def compiled_ptx(launched: launch.Launch, capability: int) -> str:
    """PTX of a launch for a compute capability."""
    arguments = {**launched.arguments, **launched.constants}
    return compile_kernel(launched.kernel, arguments, launched.num_warps, launched.num_stages, capability)[0].ptx


def edited(kernel: Any, old: str, new: str, **names: Any) -> Any:
    """A kernel with a planted bug: ``old`` (it must occur) in its source is ``new``.

    ``names``: edited helpers that it calls instead of its own.
    """
    import triton

    source = kernel.src
    assert old in source, old
    function = type(kernel.fn)(kernel.fn.__code__, kernel.fn.__globals__ | names, kernel.fn.__name__)
    function.__module__, function.__qualname__ = kernel.fn.__module__, kernel.fn.__qualname__
    function.__annotations__, function.__defaults__ = kernel.fn.__annotations__, kernel.fn.__defaults__
    copy = triton.jit(function, do_not_specialize=kernel.do_not_specialize)
    copy._unsafe_update_src(source.replace(old, new))
    return copy


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
