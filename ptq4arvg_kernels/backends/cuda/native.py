"""The compiled module, if this installation has it, and how it is called.

Environment: ``PTQ4ARVG_CUDA_MODULE`` is the path of a compiled module to load instead of the installed one.

Kernels are started by the module. Everything above that last step (checks, plans, parameters) is the same on a GPU and
in the tests' emulator, which takes the place of the last step only (:func:`replace`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import modules
from ..override import Override
from ..views import view


class Launch(NamedTuple):
    """One kernel launch, as a stand-in for the GPU gets it.

    Attributes:
        name: of the kernel in PTX.
        grid: thread blocks along x, y, z.
        threads: per block.
        shared: dynamic shared memory of a block, bytes.
        params: the kernel's parameter, a struct.
        pointers: that many addresses at its beginning, 8 bytes each; 0 where an operand is absent.
        operands: the tensors that the addresses lie in.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    params: bytes
    pointers: int
    operands: tuple[Tensor, ...]


Launcher = Callable[[Launch], None]

_launcher: Override[Launcher] = Override("cuda_launcher")


@functools.cache
def _choose() -> tuple[ModuleType | None, str | None]:
    """The module, or why there is none."""
    path = os.environ.get("PTQ4ARVG_CUDA_MODULE")
    try:
        return modules.load("ptq4arvg_kernels._cuda", path), None
    except ModuleNotFoundError:
        return None, (
            "this installation was built without the CUDA kernels; install a wheel that has them, or from source where "
            "there is an nvcc (PTQ4ARVG_BUILD_CUDA=1 says if there is none)"
        )
    except ImportError as error:
        which = "the compiled module ptq4arvg_kernels._cuda" if path is None else f"PTQ4ARVG_CUDA_MODULE, {path!r},"
        return None, f"{which} cannot be imported ({error}); install the package again"


def why_not() -> str | None:
    """Why there is no compiled module, or None."""
    return _choose()[1]


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: this installation has none; the message says why.
    """
    found, reason = _choose()
    if found is None:
        raise RuntimeError(f"the CUDA backend is not available: {reason}")
    return found


def replaced() -> bool:
    """Whether launches go elsewhere than to a GPU (see :func:`replace`)."""
    return _launcher.get() is not None


def replace(launcher: Launcher) -> contextlib.AbstractContextManager[None]:
    """Send the launches of this thread or task to ``launcher``, which executes them before it returns."""
    return _launcher.replace(launcher)


@contextlib.contextmanager
def launching(operands: Iterable[Tensor | None]) -> Iterator[None]:
    """Around a call of the module while launches are replaced: the tensors that its launches may touch."""
    launcher = _launcher.get()
    if launcher is None:
        yield
        return
    tensors = tuple(tensor for tensor in operands if tensor is not None)

    def hand_over(name: str, grid: tuple[int, int, int], threads: int, shared: int, params: bytes, count: int) -> None:
        launcher(Launch(name, grid, threads, shared, params, count, tensors))

    module().replace_launches(hand_over)
    try:
        yield
    finally:
        module().replace_launches(None)


# Inductor's way to the current stream as a number: a tenth of the time of torch.cuda.current_stream.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def stream_of(device: torch.device) -> tuple[int, int]:
    """Where a launch goes: the device's index and its current stream, as a number."""
    if device.type != "cuda":
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    if _raw_stream is not None:
        return index, _raw_stream(index)
    return index, int(torch.cuda.current_stream(index).cuda_stream)


def run(function: str, device: torch.device, *arguments: Any) -> Any:
    """Call a function of the module, tensors among the arguments as views, on the current stream of ``device``."""
    given = [view(value) if isinstance(value, Tensor) else value for value in arguments]
    with launching(value for value in arguments if isinstance(value, Tensor)):
        return getattr(module(), function)(*given, *stream_of(device))
