"""Triton functions compiled ahead of time: no GPU and no driver takes part. Triton is imported when it is needed, so
that CUDA kernels can be emulated without it."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.ptxsim.counters import Result
from tests.ptxsim.launcher import Module, load_ptx


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What Triton's compiler made of a function for one signature.

    Attributes:
        shared_bytes: dynamic shared memory; ``threads``: of a block.
    """

    name: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    threads: int

    @cached_property
    def module(self) -> Module:
        return load_ptx(self.ptx)

    def launch(
        self, grid: int | Sequence[int], args: Iterable[Any], module: Module | None = None, **options: Any
    ) -> Result:
        """Run with the run-time arguments in order; constexprs are compiled in, and Triton's scratch pointers are null.

        ``module``: other PTX of the same kernel. ``options`` as ``Module.launch`` takes them.
        """
        return (module or self.module).launch(
            self.name, grid, self.threads, args, shared_bytes=self.shared_bytes, pad_params=True, **options
        )

    def sass(self) -> str:
        """Disassembly, by the nvdisasm that comes with Triton."""
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([str(tool), file.name], capture_output=True, text=True, check=True).stdout


def triton_ptx(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    cc: int = 80,
    aligned: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> CompiledKernel:
    """Compile a ``triton.jit`` function.

    Args:
        signature: Triton's type of every run-time parameter: "*i8", "i32", "fp32", ...
        constants: values of the constexprs, and of parameters that are compiled in.
        cc: compute capability, major * 10 + minor.
        aligned: parameters divisible by 16.
        options: further compiler options, such as enable_fp_fusion.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {name: "constexpr" if name in constants else signature[name] for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(fn=function, signature=kinds, constexprs=dict(constants), attrs=attributes),
        target=GPUTarget("cuda", cc, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **options},
    )
    kernel = CompiledKernel(
        name=compiled.metadata.name,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        shared_bytes=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
    )
    # Warp specialisation can add warps beyond num_warps.
    required = kernel.module.required_threads(kernel.name)
    return kernel if required in (None, kernel.threads) else dataclasses.replace(kernel, threads=required)
