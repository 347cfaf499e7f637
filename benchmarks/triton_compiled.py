"""Recorded launches compiled ahead of time for a compute capability, and what the result consists of."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ptq4arvg_kernels.backends.triton.launch import Launch

from . import sass
from .loops import products_per_loop
from .triton_launches import is_gemm


def emulation() -> Any:
    """The module that compiles and emulates launches; it belongs to the tests.

    Raises:
        RuntimeError: this is not a checkout of the repository, or Triton is missing.
    """
    try:
        from tests.ptxsim import triton_launcher
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith("tests"):
            raise RuntimeError(
                "the folder tests/ptxsim is not there: run this from the root of a checkout of the repository, "
                "python -m benchmarks..."
            ) from error
        raise RuntimeError(f"{missing} is not installed: pip install {missing}") from error
    return triton_launcher


@dataclass(frozen=True)
class Compiled:
    """A kernel for one compute capability.

    Attributes:
        threads: of a block; more than Triton was asked for where it specialises warps.
        shared_bytes: dynamic shared memory of a block.
        hot_loop: the loop of a GEMM; None for other kernels.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    hot_loop: sass.HotLoop | None


def compile_launch(started: Launch, capability: int) -> Any:
    """The compiled kernel (``tests.ptxsim.triton_kernel.CompiledKernel``) of a launch."""
    arguments = {**started.arguments, **started.constants}
    compiled, _ = emulation().compile_kernel(
        started.kernel, arguments, started.num_warps, started.num_stages, capability
    )
    return compiled


_EXAMINED: dict[Any, Compiled] = {}


def examine(started: Launch, capability: int) -> Compiled:
    """Compile a launch and look at its machine code; once per compiled kernel.

    Raises:
        ValueError: a GEMM without a loop over 8-bit products.
    """
    compiled = compile_launch(started, capability)
    if compiled.cubin not in _EXAMINED:
        used = sass.resources(compiled.cubin)
        loop = None
        if is_gemm(started):
            listing = sass.parse(sass.disassemble(compiled.cubin))
            loop = sass.hot_loop(listing, products_per_loop(compiled.ptx))
        _EXAMINED[compiled.cubin] = Compiled(
            used.registers, used.spill_bytes, compiled.shared_bytes, compiled.threads, loop
        )
    return _EXAMINED[compiled.cubin]


@functools.cache
def triton_version() -> str:
    import triton

    return str(triton.__version__)
