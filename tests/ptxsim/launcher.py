"""load_ptx(text) -> Module; Module.launch(...) -> Result."""

from __future__ import annotations

import dataclasses
import multiprocessing
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptxsim.counters import Counters, Result, classify, line_counters, shared_granule
from tests.ptxsim.errors import PTXError
from tests.ptxsim.machine import Machine
from tests.ptxsim.memory import GlobalMemory
from tests.ptxsim.parser import parse
from tests.ptxsim.ptx_types import GLOBAL_BASE, MAX_SHARED, SHARED_BASE, SHARED_LIMIT
from tests.ptxsim.scheduler import SCHEDULES, Scheduler
from tests.ptxsim.syntax import Function, Parameter

Triple = tuple[int, int, int]
HAZARDS = ("raise", "record", "off")
BATCH_THREADS = 4096  # threads executed side by side by default: larger arrays leave the caches


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Pointer into a contiguous array: the allocation is all of it, [offset, offset + size) of it may be touched.

    Several pointers into one array allow what any of them does. ``size`` None: to the end of the array.
    """

    array: np.ndarray
    offset: int = 0
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class Struct:
    """A struct by value that holds pointers: its bytes, and which of its 8-byte words point where.

    Attributes:
        raw: the struct; the words named in ``pointers`` are replaced.
        pointers: byte offset in the struct -> where it points.
    """

    raw: bytes
    pointers: Mapping[int, Pointer]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a launch runs; see :meth:`Module.launch`."""

    hazards: str = "raise"
    schedule: str = "lockstep"
    seed: int = 0
    lazy_unsupported: bool = False
    max_steps: int = 50_000_000
    timeout_s: float = 3600

    def __post_init__(self) -> None:
        if self.hazards not in HAZARDS:
            raise ValueError(f"hazards={self.hazards!r}: one of {', '.join(HAZARDS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: one of {', '.join(SCHEDULES)}")


@dataclasses.dataclass
class LaunchState:
    """What all batches of a launch share."""

    function: Function
    grid: Triple
    block: Triple
    options: Options
    global_memory: GlobalMemory
    parameters: np.ndarray
    symbols: dict[Any, tuple[str, int]]
    shared_bytes: int
    dynamic_shared_bytes: int
    granule: int
    counters: Counters = dataclasses.field(default_factory=Counters)
    findings: dict[Any, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Buffer:
    """A device copy of an array at ``place`` in global memory; the argument points ``offset`` bytes into it."""

    array: np.ndarray
    place: int
    offset: int


@dataclasses.dataclass
class _Partial:
    """Counters of some batches, as they travel between processes."""

    executed: Counter[int]
    threads: int
    stat: Counter[str]
    findings: dict[Any, dict[str, Any]]
    lines: dict[int, list[int]]


class Module:
    """A loaded PTX module. ``kernels``: its entry functions by name; ``target``: such as sm_80."""

    def __init__(self, text: str) -> None:
        self.text, self.program = text, parse(text)
        self.kernels = {name: function for name, function in self.program.functions.items() if function.entry}
        self.target = self.program.target

    def kernel(self, name: str) -> Function:
        """By name, or by a part of the name that only one kernel has."""
        if name in self.kernels:
            return self.kernels[name]
        candidates = [kernel for kernel in self.kernels if name in kernel]
        if len(candidates) != 1:
            raise PTXError(f"kernel {name!r} not found (or ambiguous); have: {', '.join(self.kernels)}")
        return self.kernels[candidates[0]]

    def required_threads(self, name: str) -> int | None:
        """Threads of .reqntid, if the kernel says so."""
        required = self.kernel(name).directives.get("reqntid")
        return int(np.prod(required)) if required else None

    def launch(
        self,
        kernel_name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Iterable[Any] = (),
        shared_bytes: int = 0,
        *,
        ctas: Iterable[int | Triple] | None = None,
        names: Sequence[str] = (),
        pad_params: bool = False,
        copy_back: bool = True,
        workers: int = 1,
        batch: int | None = None,
        **options: Any,
    ) -> Result:
        """Run a kernel.

        Args:
            args: numpy arrays or torch CPU tensors (device buffers, copied in, and back in place), Python or numpy
                scalars, bytes or :class:`Struct` (a struct by value), None (a null pointer), (array, byte offset) or
                :class:`Pointer`.
                The same array given twice is one buffer.
            shared_bytes: dynamic shared memory.
            ctas: run only these blocks, given as (x, y, z) or as linear indices.
            names: of the arguments, for messages.
            pad_params: fill missing trailing parameters with null (Triton's scratch pointers).
            copy_back: write changed buffers back.
            workers: processes; kernels with atom or red stay in one.
            batch: blocks executed side by side.
            options: hazards: "raise" a HazardError at the end, "record" in ``Result.findings`` or "off"; schedule and
                seed, see scheduler.py; lazy_unsupported: complain of an unknown instruction only when it executes;
                max_steps, timeout_s: limits of one batch.

        Raises:
            PTXError: arguments that do not fit, an unsupported instruction, a fault or a hazard, as its subclasses.
        """
        begin = time.monotonic()
        function = self.kernel(kernel_name)
        grid, block = _triple(grid), _triple(block)
        _check_block(function, block)
        args = list(args)
        if pad_params:
            args += [None] * (len(function.parameters) - len(args))
        _check_count(function, args)
        memory = GlobalMemory()
        places = _Places(memory)
        placed = _place_all(function, places, args, names)
        symbols = self._reserve_variables(function, memory)
        memory.build(places.windows, between_processes=workers > 1)
        for buffer in places.buffers:
            data = np.ascontiguousarray(buffer.array).reshape(-1).view(np.uint8)
            memory.buffer[buffer.place : buffer.place + data.nbytes] = data
        self._initialise_variables(function, memory, symbols)
        static, shared_symbols = self._shared_layout(function, shared_bytes)
        parameters = _parameter_block(function, placed)
        state = LaunchState(
            function=function,
            grid=grid,
            block=block,
            options=Options(**options),
            global_memory=memory,
            parameters=parameters,
            symbols=symbols | shared_symbols,
            shared_bytes=static + shared_bytes,
            dynamic_shared_bytes=shared_bytes,
            granule=shared_granule(function),
        )
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        if ctas is not None:
            blocks = [cta if isinstance(cta, tuple) else blocks[cta] for cta in ctas]
        if workers > 1 and any(instruction.base in ("atom", "red") for instruction in function.instructions):
            workers = 1  # atomics of different processes are not atomic
        if batch is None:
            batch = max(1, BATCH_THREADS // (-(-block[0] * block[1] * block[2] // 32) * 32))
        if workers > 1:
            batch = max(1, min(batch, -(-len(blocks) // workers)))
        batches = [blocks[i : i + batch] for i in range(0, len(blocks), batch)]
        if workers > 1 and len(batches) > 1:
            partials = _run_in_processes(lambda part: _run(state, part), batches, workers)
        else:
            partials = [_run(state, batches)]
        result = _merge(function, partials)
        result.seconds, result.ctas = time.monotonic() - begin, len(blocks)
        result.grid, result.block = grid, block
        if copy_back:
            _copy_back(memory, places.buffers)
        return result.check() if state.options.hazards == "raise" else result

    # -------------------------------------------------------------------------------- variables
    def _variables(self, function: Function) -> list[tuple[Any, Any]]:
        return [*self.program.variables.items(), *function.variables.items()]

    def _reserve_variables(self, function: Function, memory: GlobalMemory) -> dict[Any, tuple[str, int]]:
        symbols = {}
        for key, variable in self._variables(function):
            if variable.space in ("global", "const"):
                name = f".{variable.space} {variable.name}"
                symbols[key] = "global", GLOBAL_BASE + memory.reserve(name, variable.size, max(variable.align, 256))
        return symbols

    def _initialise_variables(
        self, function: Function, memory: GlobalMemory, symbols: dict[Any, tuple[str, int]]
    ) -> None:
        for key, variable in self._variables(function):
            if variable.space in ("global", "const"):
                place = symbols[key][1] - GLOBAL_BASE
                memory.buffer[place : place + variable.size] = 0
                if variable.init:
                    memory.buffer[place : place + len(variable.init)] = np.frombuffer(variable.init, np.uint8)

    def _shared_layout(self, function: Function, dynamic: int) -> tuple[int, dict[Any, tuple[str, int]]]:
        """Bytes of static shared memory, behind which the dynamic part begins, and the addresses of the variables."""
        symbols: dict[Any, tuple[str, int]] = {}
        end, unsized = 0, []
        for key, variable in self._variables(function):
            if variable.space != "shared":
                continue
            if variable.extern or variable.size == 0:
                unsized.append((key, variable))
                continue
            end = -(-end // variable.align) * variable.align
            symbols[key] = "shared", SHARED_BASE + end
            end += variable.size
        if unsized:
            align = max(16, *(variable.align for _, variable in unsized))
            end = -(-end // align) * align
            symbols |= {key: ("shared", SHARED_BASE + end) for key, _ in unsized}
        elif dynamic:
            raise PTXError(f"shared_bytes={dynamic}, but {function.name} declares no dynamic shared memory")
        limit = SHARED_LIMIT.get(self.target.rstrip("af"), MAX_SHARED)
        if end + dynamic > limit:
            raise PTXError(f"{end + dynamic} bytes of shared memory exceed the {limit} of {self.target}")
        return end, symbols


def load_ptx(text: str | Path) -> Module:
    """Module of a PTX text, or of a file given as a Path."""
    return Module(text.read_text() if isinstance(text, Path) else text)


# ------------------------------------------------------------------------------------ arguments
def _triple(value: int | Sequence[int]) -> Triple:
    numbers = [int(v) for v in (value if isinstance(value, Sequence) else (value,))]
    x, y, z = [*numbers, 1, 1][:3]
    return x, y, z


def _check_block(function: Function, block: Triple) -> None:
    threads = block[0] * block[1] * block[2]
    if not 1 <= threads <= 1024:
        raise PTXError(f"block of {threads} threads; 1 to 1024 are possible")
    required = function.directives.get("reqntid")
    if required and _triple(required) != block:
        raise PTXError(f"kernel requires .reqntid {required}, launched with {block}")
    most = function.directives.get("maxntid")
    if most and threads > np.prod(most):
        raise PTXError(f"block of {threads} threads exceeds .maxntid {most}")


def _check_count(function: Function, args: list[Any]) -> None:
    expected = len(function.parameters)
    if len(args) == expected:
        return
    types = ", ".join("." + parameter.ty for parameter in function.parameters)
    hint = "; Triton adds two scratch pointers at the end: pass pad_params=True" if expected - len(args) == 2 else ""
    raise PTXError(f"{function.name} takes {expected} parameters ({types}), {len(args)} given{hint}")


def _as_array(value: Any) -> np.ndarray | None:
    """An argument that is a device buffer as an array over the same memory, else None."""
    if isinstance(value, np.ndarray) and value.ndim >= 1:
        if not value.flags.c_contiguous:
            raise PTXError("array arguments must be C-contiguous")
        return value
    if type(value).__module__.split(".")[0] == "torch" and hasattr(value, "data_ptr"):
        import torch

        if not value.is_contiguous():
            raise PTXError("tensor arguments must be contiguous")
        return value.detach().reshape(-1).view(torch.uint8).numpy()
    return None


class _Places:
    """Device copies of host arrays, one for equal arrays, and the windows of them that may be touched."""

    def __init__(self, memory: GlobalMemory) -> None:
        self.memory = memory
        self.buffers: list[_Buffer] = []
        self.windows: dict[int, list[tuple[int, int]]] = {}
        self._known: dict[tuple[int, int], int] = {}

    def put(self, pointer: Pointer, name: str) -> _Buffer:
        array = pointer.array
        identity = array.__array_interface__["data"][0], array.nbytes
        if array.nbytes == 0 or identity not in self._known:
            self._known[identity] = self.memory.reserve(name, array.nbytes)
        place = self._known[identity]
        buffer = _Buffer(array, place, pointer.offset)
        size = array.nbytes - pointer.offset if pointer.size is None else pointer.size
        begin = place if pointer.size is None else place + pointer.offset
        self.windows.setdefault(place, []).append((begin, place + pointer.offset + size))
        self.buffers.append(buffer)
        return buffer


def _place_all(function: Function, places: _Places, args: list[Any], names: Sequence[str]) -> list[Any]:
    """The arguments with every array replaced by its :class:`_Buffer`, those inside structs too."""
    placed: list[Any] = []
    for i, arg in enumerate(args):
        name = f"arg {i} ({names[i] if i < len(names) else function.parameters[i].name})"
        if isinstance(arg, Struct):
            words = {offset: places.put(pointer, f"{name} + {offset}") for offset, pointer in arg.pointers.items()}
            placed.append((arg, words))
            continue
        if isinstance(arg, tuple):
            arg = Pointer(_as_array(arg[0]), arg[1])
        elif not isinstance(arg, Pointer):
            whole = _as_array(arg)
            if whole is None:
                placed.append(arg)
                continue
            arg = Pointer(whole)
        placed.append(places.put(arg, name))
    return placed


def _parameter_block(function: Function, placed: list[Any]) -> np.ndarray:
    last = function.parameters[-1] if function.parameters else None
    block = np.zeros(max(-(-(last.offset + last.size) // 16) * 16, 16) if last else 16, np.uint8)
    for parameter, arg in zip(function.parameters, placed, strict=True):
        raw = _encode(parameter, arg)
        block[parameter.offset : parameter.offset + len(raw)] = np.frombuffer(raw, np.uint8)
    return block


def _address(buffer: _Buffer) -> bytes:
    return struct.pack("<Q", GLOBAL_BASE + buffer.place + buffer.offset)


def _encode(parameter: Parameter, arg: Any) -> bytes:
    """Bytes of an argument, as :func:`_place_all` leaves it, in the parameter block."""
    name, size, ty = parameter.name, parameter.size, parameter.ty
    if isinstance(arg, _Buffer):
        if size != 8 or parameter.array:
            raise PTXError(f"parameter {name} is .{ty} ({size} bytes), not a pointer")
        return _address(arg)
    if isinstance(arg, tuple):
        whole, words = arg
        raw = bytearray(whole.raw)
        for offset, buffer in words.items():
            raw[offset : offset + 8] = _address(buffer)
        arg = bytes(raw)
    if arg is None:
        return bytes(size)
    if isinstance(arg, (bytes, bytearray)):
        if len(arg) != size:
            raise PTXError(f"parameter {name} has {size} bytes, got {len(arg)}")
        return bytes(arg)
    if parameter.array:
        raise PTXError(f"parameter {name} is a struct of {size} bytes: pass bytes")
    if isinstance(arg, np.generic):
        if arg.nbytes == size and not (ty[0] in "us" and arg.dtype.kind == "f"):
            return arg.tobytes()
        arg = arg.item()
    if ty in ("f32", "f64"):
        return struct.pack("<f" if ty == "f32" else "<d", float(arg))
    if isinstance(arg, float):
        raise PTXError(f"parameter {name} is .{ty}: a Python float is ambiguous, pass np.float32 or np.float64")
    return (int(arg) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _copy_back(memory: GlobalMemory, buffers: list[_Buffer]) -> None:
    """Only what changed: an input may live in memory that cannot be written."""
    for buffer in buffers:
        if not buffer.array.flags.writeable:
            continue
        target = buffer.array.reshape(-1).view(np.uint8)
        data = memory.buffer[buffer.place : buffer.place + buffer.array.nbytes]
        if not np.array_equal(data, target):
            target[...] = data


# ------------------------------------------------------------------------------------ execution
def _run(state: LaunchState, batches: list[list[Triple]]) -> _Partial:
    executed: Counter[int] = Counter()
    threads = 0
    with np.errstate(all="ignore"):
        for block_ids in batches:
            scheduler = Scheduler(Machine(state, block_ids))
            scheduler.run()
            for block in scheduler.blocks.values():
                if block.executed_warps:
                    for instruction in block.instructions:
                        executed[instruction.index] += block.executed_warps
                    threads += block.executed_threads * len(block.instructions)
    return _Partial(executed, threads, state.counters.stat, state.findings, dict(state.counters.lines))


def _child(pipe: Any, run: Callable[[Any], _Partial], batches: list[list[Triple]]) -> None:
    try:
        pipe.send(run(batches))
    except PTXError as error:
        pipe.send(PTXError(str(error)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        pipe.send(PTXError(f"worker: {type(error).__name__}: {error}"))


def _run_in_processes(run: Callable[[Any], _Partial], batches: list[list[Triple]], workers: int) -> list[_Partial]:
    context = multiprocessing.get_context("fork")
    children = []
    for worker in range(workers):
        receiver, sender = context.Pipe(False)
        process = context.Process(target=_child, args=(sender, run, batches[worker::workers]))
        process.start()
        sender.close()
        children.append((receiver, process))
    answers: list[Any] = []
    for receiver, process in children:
        try:
            answers.append(receiver.recv())
        except EOFError:
            answers.append(PTXError("worker process died"))
        process.join()
    for answer in answers:
        if isinstance(answer, PTXError):
            raise answer
    return answers


def _merge(function: Function, partials: list[_Partial]) -> Result:
    result, findings = Result(), {}
    executed: Counter[int] = Counter()
    lines = line_counters()
    for partial in partials:
        executed.update(partial.executed)
        result.thread_insts += partial.threads
        result.stat.update(partial.stat)
        for key, finding in partial.findings.items():
            if key in findings:
                findings[key]["count"] += finding["count"]
                findings[key]["bytes"] += finding["bytes"]
            else:
                findings[key] = finding
        for index, counts in partial.lines.items():
            lines[index] = [a + b for a, b in zip(lines[index], counts, strict=True)]
    program = function.instructions
    for index, count in executed.items():
        result.classes[classify(program[index])] += count
    result.inst_counts = {(program[i].line, program[i].opcode): count for i, count in executed.items()}
    result.lines = {(program[i].line, program[i].text): counts for i, counts in lines.items()}
    result.findings = list(findings.values())
    return result
