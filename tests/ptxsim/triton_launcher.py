"""Stands in for a GPU under the Triton backend: compiles each launch ahead of time and runs its PTX in the emulator.

    emulator = EmulatedDevice()                      # compute capability 8.0
    with launch.replace(emulator):
        ...                                          # production code on CPU tensors
    emulator.records[-1].result.metrics()

What Triton's JIT derives from the arguments of a launch (types, divisibility by 16, integers equal to 1, absent
operands) is derived here in the same way, so that the code that runs is the code a GPU would run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ptq4arvg_kernels.backends.triton.launch import Launch, compile_options
from tests.ptxsim.counters import Result
from tests.ptxsim.device import Device, pointer_into, storage_offset
from tests.ptxsim.launcher import Module
from tests.ptxsim.triton_kernel import CompiledKernel, triton_ptx

# Triton's names of the element types (triton/runtime/jit.py, type_canonicalisation_dict).
ELEMENT_TYPES = {
    torch.bool: "u1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclasses.dataclass(frozen=True)
class Specialization:
    """What a launch is compiled for, as Triton's JIT would: see :func:`specialize`.

    Attributes:
        signature: type of every parameter by name, in order; ``constexpr`` for those compiled in.
        constants: their values.
        aligned: names of the pointers and integers divisible by 16.
    """

    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]

    def run_time(self) -> list[str]:
        """Names of the parameters that the compiled kernel still takes."""
        return [name for name, kind in self.signature.items() if kind != "constexpr"]

    def key(self) -> tuple[Any, ...]:
        """Hashable; constants by value, functions by their source."""
        constants = tuple((name, getattr(value, "cache_key", repr(value))) for name, value in self.constants.items())
        return tuple(self.signature.items()), constants, self.aligned


def _integer_type(name: str, value: int) -> str:
    if -(2**31) <= value < 2**31:
        return "i32"
    if -(2**63) <= value < 2**63:
        return "i64"
    if value < 2**64:
        return "u64"
    raise ValueError(f"argument {name}={value} does not fit into 64 bits")


def specialize(kernel: JITFunction, arguments: Mapping[str, Any]) -> Specialization:
    """Types and constants of a launch: tensors become pointers to their dtype, ints i32 or i64 (1 is compiled in),
    floats fp32, None is compiled in. Divisibility of a pointer is that of its offset in its storage: allocations are
    aligned.

    Raises:
        TypeError: an argument is missing, unknown to the kernel or of a type that Triton does not take.
    """
    names = [parameter.name for parameter in kernel.params]
    if unknown := sorted(set(arguments) - set(names)):
        raise TypeError(f"{kernel.__name__} has no parameter {', '.join(unknown)}; it takes {', '.join(names)}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for parameter in kernel.params:
        name = parameter.name
        if name not in arguments and not parameter.has_default:
            raise TypeError(f"{kernel.__name__} is started without its argument {name}")
        value = arguments.get(name, parameter.default)
        may_specialize = not parameter.do_not_specialize
        may_align = may_specialize and not parameter.do_not_specialize_on_alignment
        declared = parameter.annotation_type
        may_align = may_align and not declared.startswith(("fp", "bf", "u1"))
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            if value.dtype not in ELEMENT_TYPES:
                raise TypeError(f"argument {name} of {kernel.__name__}: Triton has no pointers to {value.dtype}")
            const = "k" if parameter.is_const else ""
            signature[name] = declared or f"*{const}{ELEMENT_TYPES[value.dtype]}"
            if may_align and storage_offset(value) % 16 == 0:
                aligned.append(name)
        elif isinstance(value, bool):
            signature[name] = declared or "u1"
        elif isinstance(value, int):
            if value == 1 and may_specialize and not declared:
                signature[name], constants[name] = "constexpr", 1
                continue
            signature[name] = declared or _integer_type(name, value)
            if may_align and value % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature[name] = declared or "fp32"
        else:
            raise TypeError(f"argument {name} of {kernel.__name__}: {type(value).__name__} is nothing Triton takes")
    return Specialization(signature, constants, tuple(aligned))


_COMPILED: dict[tuple[Any, ...], CompiledKernel] = {}


def compile_kernel(
    kernel: JITFunction,
    arguments: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    capability: int = 80,
) -> tuple[CompiledKernel, Specialization]:
    """Compile what a launch with these arguments (run-time and constexpr) needs; once per process for equal
    specializations.

    Raises:
        TypeError: see :func:`specialize`; or ``kernel`` is no compiled Triton function.
    """
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"{kernel!r} is a {type(kernel).__name__}: the emulator needs a triton.jit function as it is without "
            "TRITON_INTERPRET=1"
        )
    special = specialize(kernel, arguments)
    key = (kernel.cache_key, *special.key(), num_warps, num_stages, capability)
    if key not in _COMPILED:
        _COMPILED[key] = triton_ptx(
            kernel,
            special.signature,
            special.constants,
            capability,
            special.aligned,
            **compile_options(num_warps, num_stages, capability),
        )
    return _COMPILED[key], special


@dataclasses.dataclass(frozen=True)
class LaunchRecord:
    """One executed launch: what ran, how, and the counters of the emulator."""

    launch: Launch
    compiled: CompiledKernel
    result: Result

    @property
    def name(self) -> str:
        return self.compiled.name


class EmulatedDevice(Device[LaunchRecord]):
    """A launcher for ``launch.replace``: runs grids in the emulator, on CPU tensors in place.

    Two arguments that view the same storage alias each other, as on a GPU. A kernel may touch a storage only between
    the first and the last element of the arguments that view it.

    Args:
        capability: compute capability to compile for, major * 10 + minor. 80, 86, 89, 90 and 120 execute.
        options: see :class:`tests.ptxsim.device.Device`.
    """

    def __init__(self, capability: int = 80, **options: Any) -> None:
        super().__init__(**options)
        self.capability = capability

    def module(self, compiled: CompiledKernel) -> Module:
        """The loaded PTX, edited by ``transform``."""
        return compiled.module if self.transform is None else self.edited(compiled.ptx)

    def __call__(self, launch: Launch) -> None:
        arguments = {**launch.arguments, **launch.constants}
        compiled, special = compile_kernel(
            launch.kernel, arguments, launch.num_warps, launch.num_stages, self.capability
        )
        names = special.run_time()
        defaults = launch.kernel.signature.parameters
        result = compiled.launch(
            launch.grid,
            [_operand(name, arguments.get(name, defaults[name].default)) for name in names],
            self.module(compiled),
            names=names,
            **self.options,
        )
        if self.record:
            self.records.append(LaunchRecord(launch, compiled, result))


def _operand(name: str, value: Any) -> Any:
    """A launch argument as ``Module.launch`` takes it: a tensor is a pointer into its whole storage."""
    return pointer_into(value, name=f"argument {name}") if isinstance(value, Tensor) else value
