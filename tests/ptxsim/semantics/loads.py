"""ld, st, atom, red, cp.async (PTX ISA, "Data Movement and Conversion Instructions", "Parallel Synchronization and
Communication Instructions")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptxsim.errors import PTXError
from tests.ptxsim.ptx_types import DTYPE, UINT, WIDTH
from tests.ptxsim.semantics.addresses import address, resolve_param, take_space, vector_items, vector_length
from tests.ptxsim.semantics.decoder import Decoder, Execute, join, split
from tests.ptxsim.semantics.rounding import bf16_to_f32, f32_to_bf16
from tests.ptxsim.syntax import Negated, Register, Sink, Symbol


def load(op: Decoder) -> Execute:
    """ld, ldu"""
    space, count = take_space(op), vector_length(op)
    ty = op.type()
    space = resolve_param(op, op.operands[1], space)
    signed, bits = ty[0] == "s", WIDTH[ty]
    dtype, size = DTYPE[ty] if signed else UINT[bits], bits // 8 * count
    out = ty if signed else f"b{bits}"
    destinations = [
        (i, op.machine.destination(item, out))
        for i, item in enumerate(vector_items(op.operands[0], count))
        if not isinstance(item, Sink)
    ]
    where, memory = address(op, op.operands[1], space), op.machine.memory
    if space == "kparam" and isinstance(op.operands[1].base, Symbol):  # the same for the whole launch
        offset, block = int(where()[0]), op.machine.parameters
        if offset + size > len(block):
            raise PTXError("parameter load outside the parameter block")
        constant = block[offset : offset + size].copy().view(dtype)

        def execute_constant(mask: np.ndarray | None) -> None:
            for i, d in destinations:
                d[slice(None) if mask is None else mask] = constant[i]

        return execute_constant

    def execute(mask: np.ndarray | None) -> None:
        threads, values = memory.load(op.instruction, space, mask, where(), size, dtype, count)
        for i, d in destinations:
            d[slice(None) if mask is None else threads] = values[:, i]

    return execute


def store(op: Decoder) -> Execute:
    """st"""
    space, count = take_space(op), vector_length(op)
    bits = WIDTH[op.type()]
    space = resolve_param(op, op.operands[0], space)
    sources = [op.machine.source(item, f"b{bits}") for item in vector_items(op.operands[1], count)]
    where, machine = address(op, op.operands[0], space), op.machine

    def execute(mask: np.ndarray | None) -> None:
        values = np.empty((machine.threads, count), UINT[bits])
        for i, source in enumerate(sources):
            values[:, i] = source
        machine.memory.store(op.instruction, space, mask, where(), bits // 8 * count, values)

    return execute


# ------------------------------------------------------------------------------------ atomics
Update = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], np.ndarray]


def _update(operation: str, ty: str) -> Update:
    """(old, b, c) -> new"""
    if ty == "bf16":
        return lambda old, b, c: f32_to_bf16(bf16_to_f32(old) + bf16_to_f32(b))
    if ty == "f16x2":
        return lambda old, b, c: join(split(old, np.float16) + split(b, np.float16))
    if ty == "bf16x2":
        return lambda old, b, c: join(
            f32_to_bf16(bf16_to_f32(split(old, np.uint16)) + bf16_to_f32(split(b, np.uint16)))
        )
    one = DTYPE[ty](1)
    return {
        "add": lambda old, b, c: old + b,
        "min": lambda old, b, c: np.minimum(old, b),
        "max": lambda old, b, c: np.maximum(old, b),
        "exch": lambda old, b, c: b,
        "and": lambda old, b, c: old & b,
        "or": lambda old, b, c: old | b,
        "xor": lambda old, b, c: old ^ b,
        "cas": lambda old, b, c: np.where(old == b, c, old),
        "inc": lambda old, b, c: np.where(old >= b, old - old, old + one),
        "dec": lambda old, b, c: np.where((old == 0) | (old > b), b, old - one),
    }[operation]


def atomic(op: Decoder) -> Execute:
    """atom and red; threads that meet at one address take their turns in lane order."""
    space = take_space(op)
    op.flag("noftz")
    count = vector_length(op)
    operation = op.flag("add", "min", "max", "inc", "dec", "cas", "exch", "and", "or", "xor")
    ty = op.type()
    if operation is None or (operation != "add" and ty in ("bf16", "f16x2", "bf16x2")):
        raise op.unsupported()
    size, dtype, update, machine = WIDTH[ty] // 8, DTYPE[ty], _update(operation, ty), op.machine
    reduction = op.base == "red"
    operands = op.operands if reduction else op.operands[1:]
    where = address(op, operands[0], space)
    sources = [machine.source(item, ty) for item in vector_items(operands[1], count)]
    compare = machine.source(operands[2], ty) if operation == "cas" else None
    destinations = None
    if not reduction and not isinstance(op.operands[0], Sink):
        destinations = [machine.destination(item, ty) for item in vector_items(op.operands[0], count)]

    def locate(threads: np.ndarray, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The buffer and the offset of each access, checked and booked."""
        home = space
        if home == "generic":
            parts = machine.memory.spaces(addresses)
            if len(parts) > 1:
                raise op.unsupported(" on mixed generic spaces")
            home, _, addresses = parts[0]
        if home == "global":
            offsets = machine.memory.global_offsets(op.instruction, threads, addresses, size * count, "atomic", True)
            return machine.global_memory.buffer, offsets
        if home != "shared":
            raise op.unsupported(f" on .{home}")
        offsets = machine.memory.shared_offsets(op.instruction, threads, addresses, size, "atomic")
        machine.counters.shared_access(op.instruction, threads, offsets, size, "sst", machine.threads)
        offsets = machine.memory.in_all_blocks(offsets, threads)
        if machine.races is not None:
            machine.races.check(op.instruction, offsets, size, threads, True, atomic=True)
        return machine.shared, offsets

    def execute(mask: np.ndarray | None) -> None:
        threads = machine.active(mask)
        buffer, offsets = locate(threads, op.broadcast(where())[threads].astype(np.uint64))
        machine.counters.stat["atomic_lanes"] += len(threads)
        cells = buffer.view(dtype)
        for k, source in enumerate(sources):
            cell, value = offsets // size + k, op.broadcast(source)[threads]
            other = None if compare is None else op.broadcast(compare)[threads]
            returned, left = np.empty(len(threads), dtype), np.arange(len(threads))
            while len(left):
                _, first = np.unique(cell[left], return_index=True)
                now = left[first]
                old = returned[now] = cells[cell[now]]
                cells[cell[now]] = update(old, value[now], None if other is None else other[now])
                left = np.delete(left, first)
            if destinations:
                destinations[k][threads] = returned

    return execute


# ------------------------------------------------------------------------------------ cp.async
def copy_async(op: Decoder) -> Execute:
    """cp.async with its commit_group, wait_group and wait_all; the bulk forms are not there."""
    if op.modifiers[:1] != ["async"] or {"bulk", "mbarrier", "reduce"} & set(op.modifiers):
        raise op.unsupported()
    op.flag("async")
    memory = op.machine.memory
    if op.flag("commit_group"):
        return memory.commit
    if op.flag("wait_all"):
        return lambda mask: memory.wait(mask, None)
    if op.flag("wait_group"):
        may_stay = op.operands[0].value
        return lambda mask: memory.wait(mask, may_stay)
    level = op.flag("ca", "cg")
    op.flags("shared", "shared::cta", "global", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B")
    size = op.operands[2].value
    if size not in (4, 8, 16) or (level == "cg" and size != 16):
        raise PTXError(f"cp.async of {size} bytes")
    destination, source = address(op, op.operands[0], "shared"), address(op, op.operands[1], "global")
    taken: np.ndarray = np.array([size], np.uint32)
    ignore = None
    if len(op.operands) > 3:
        extra = op.operands[3]
        if isinstance(extra, Negated) or (isinstance(extra, Register) and extra.ty == "pred"):
            ignore = op.predicate(3)  # ignore-src: nothing is read, zeros arrive
        elif not (isinstance(extra, Register) and WIDTH[extra.ty] == 64):  # 64 bits: a cache policy
            taken = op.source(3, "u32")

    def execute(mask: np.ndarray | None) -> None:
        count = taken if ignore is None else np.where(ignore(), 0, size)
        memory.copy_async(op.instruction, mask, destination(), source(), size, count)

    return execute


HANDLERS = {"ld": load, "ldu": load, "st": store, "atom": atomic, "red": atomic, "cp": copy_async}
