"""The one place where a Triton kernel is started.

Everything above this call (shapes, tiles, workspaces, arguments) is the same on a GPU, in Triton's interpreter and in
the PTX emulator of the tests, which replace the last step only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .. import gpu
from ..override import Override


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: thread blocks along x, y, z.
        arguments: run-time arguments by name: tensors, ints, floats, or None for an operand that is absent.
        constants: constexpr arguments by name.
        num_warps, num_stages: as Triton means them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


Launcher = Callable[[Launch], None]

REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor; of a thread


def compile_options(num_warps: int, num_stages: int, capability: int) -> dict[str, Any]:
    """What Triton compiles our kernels with.

    enable_fp_fusion stays off: the laws forbid fused multiply-adds. maxnreg names the limit that the hardware has
    anyway; without it the assembler of sm_100 and sm_120 spills registers so that more blocks would fit. Older
    architectures have another assembler, which schedules worse with it.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if capability >= 100:
        options["maxnreg"] = min(MOST_REGISTERS, REGISTERS // (32 * num_warps))
    return options


_launcher: Override[Launcher] = Override("triton_launcher")


def _device_of(arguments: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))


def _native(launch: Launch) -> None:
    """On the operands' device and its current stream."""
    device = _device_of(launch.arguments)
    native = device.type == "cuda"  # or interpreted
    capability = gpu.describe(device).capability if native else 0
    with torch.cuda.device(device) if native else contextlib.nullcontext():
        launch.kernel[launch.grid](
            **launch.arguments,
            **launch.constants,
            **compile_options(launch.num_warps, launch.num_stages, capability),
        )


def start(launch: Launch) -> None:
    """Start a kernel, unless its grid is empty."""
    if 0 not in launch.grid:
        (_launcher.get() or _native)(launch)


def replaced() -> bool:
    """Whether launches go elsewhere than to a GPU (see :func:`replace`)."""
    return _launcher.get() is not None


def replace(launcher: Launcher) -> contextlib.AbstractContextManager[None]:
    """Send the launches of this thread or task to ``launcher``, which executes them before it returns."""
    return _launcher.replace(launcher)
