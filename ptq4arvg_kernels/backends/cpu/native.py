"""The compiled module, if this installation has it, and how tensors are handed to it.

Environment: ``PTQ4ARVG_CPU_ISA`` names an instruction set (``amx``, ``avx512vnni``, ``avx2``, ``portable``) to use
instead of the best one of the machine. ``PTQ4ARVG_CPU_MODULE`` is the path of a compiled module to load instead of the
installed one, such as a build for sanitizers.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from .. import modules
from ..views import ACTIVATIONS, NORMS, QK_KINDS, View, maybe, view

__all__ = ["ACTIVATIONS", "NORMS", "OK", "QK_KINDS", "WHY_NOT", "View", "maybe", "module", "threads", "view"]

OK = 0


def _choose() -> tuple[ModuleType | None, str | None]:
    """The module, or why there is none."""
    path = os.environ.get("PTQ4ARVG_CPU_MODULE")
    try:
        _cpu = modules.load("ptq4arvg_kernels._cpu", path)
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


def threads() -> int:
    """Threads a call may keep busy: torch's own number."""
    return torch.get_num_threads()
