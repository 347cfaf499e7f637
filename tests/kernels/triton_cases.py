"""Devices and planted bugs for the tests of the Triton kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ptq4arvg_kernels.backends.triton import launch, support
from tests.kernels.ptx_cases import barriers, distinct_bytes, sector_efficiency, without_barrier
from tests.ptxsim.triton_launcher import EmulatedDevice, compile_kernel

__all__ = [
    "barriers",
    "compiled_ptx",
    "device",
    "distinct_bytes",
    "edited",
    "recorded",
    "rounding_interpreter",
    "sector_efficiency",
    "without_barrier",
]


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
