"""The compiled module, if this installation has it, and how tensors are handed to it.

Environment: ``PTQ4ARVG_CPU_ISA`` names an instruction set (``amx``, ``avx512vnni``, ``avx2``, ``portable``) to use
instead of the best one of the machine. ``PTQ4ARVG_CPU_MODULE`` is the path of a compiled module to load instead of the
installed one, such as a build for sanitizers.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

View: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]

# Numbers of csrc/views.h (Element) and csrc/cpu/types.h (the enumerations).
_ELEMENTS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int8: 3,
    torch.uint8: 4,
    torch.int32: 5,
    torch.int64: 6,
}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_erf": 2, "gelu_tanh": 3}
NORMS = {"layer": 0, "rms": 1}
QK_KINDS = {"none": 0, "layer_norm": 1, "l2": 2, "rope": 3}
OK = 0


def load(path: str | None = None) -> ModuleType:
    """The compiled module of this installation, or of the file ``path``.

    One per process: Python hands out the first one again, whatever the path.

    Raises:
        ImportError: there is none, or it does not fit this Python.
    """
    name = "ptq4arvg_kernels._cpu"
    if path is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a compiled module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _choose() -> tuple[ModuleType | None, str | None]:
    """The module, or why there is none."""
    path = os.environ.get("PTQ4ARVG_CPU_MODULE")
    try:
        _cpu = load(path)
    except ImportError as error:
        if path:
            return None, f"PTQ4ARVG_CPU_MODULE is {path!r}, which cannot be imported ({error})"
        return None, (
            f"the compiled module ptq4arvg_kernels._cpu cannot be imported ({error}); install a wheel, or install from "
            "source where there is a C++17 compiler"
        )
    wanted = os.environ.get("PTQ4ARVG_CPU_ISA")
    if wanted and not _cpu.select(wanted):
        usable = ", ".join(name for name, compiled, supported in _cpu.instruction_sets() if compiled and supported)
        return None, f"PTQ4ARVG_CPU_ISA is {wanted!r}, which this machine or build does not have; usable: {usable}"
    return _cpu, None


_MODULE, WHY_NOT = _choose()


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: this installation has none; the message says why.
    """
    if _MODULE is None:
        raise RuntimeError(f"the CPU backend is not available: {WHY_NOT}")
    return _MODULE


def view(tensor: Tensor) -> View:
    """What the compiled module is told of a tensor: address, dtype, sizes, strides (in elements)."""
    return tensor.data_ptr(), _ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.stride()


def maybe(tensor: Tensor | None) -> View | None:
    """:func:`view` of an optional operand."""
    return None if tensor is None else view(tensor)


def threads() -> int:
    """Threads a call may keep busy: torch's own number."""
    return torch.get_num_threads()
