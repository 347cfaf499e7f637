"""A functional emulator of PTX on numpy, see README.md."""

from tests.ptxsim.counters import Result
from tests.ptxsim.errors import (
    DeadlockError,
    ExecError,
    HazardError,
    MemFault,
    PTXError,
    PTXParseError,
    UnsupportedInstruction,
)
from tests.ptxsim.launcher import Module, Pointer, Struct, load_ptx
from tests.ptxsim.nvcc import nvcc
from tests.ptxsim.triton_kernel import triton_ptx

__all__ = [
    "DeadlockError",
    "ExecError",
    "HazardError",
    "MemFault",
    "Module",
    "PTXError",
    "PTXParseError",
    "Pointer",
    "Result",
    "Struct",
    "UnsupportedInstruction",
    "load_ptx",
    "nvcc",
    "triton_ptx",
]
