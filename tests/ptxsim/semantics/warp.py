"""Instructions across the lanes of a warp (PTX ISA, "shfl.sync", "vote.sync", "match.sync", "redux.sync",
"elect.sync", "activemask"). The scheduler has brought together the lanes that the member mask names."""

from __future__ import annotations

import numpy as np

from tests.ptxsim.errors import ExecError
from tests.ptxsim.ptx_types import int_range
from tests.ptxsim.semantics.decoder import Decoder, Execute, write

U32 = np.uint32
LANE_BITS = U32(1) << np.arange(32, dtype=U32)


def _by_warp(op: Decoder, values: np.ndarray) -> np.ndarray:
    return op.broadcast(values).reshape(-1, 32)


def _ballot(flags: np.ndarray) -> np.ndarray:
    """(warps,) words of the bits of (threads,) flags."""
    return np.bitwise_or.reduce(np.where(flags.reshape(-1, 32), LANE_BITS, U32(0)), axis=1)


def _members(op: Decoder, member_mask: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Active lanes that the member mask names."""
    named = (_by_warp(op, member_mask) & LANE_BITS).reshape(-1) != 0
    return named if mask is None else named & mask


def shuffle(op: Decoder) -> Execute:
    """shfl.sync: c holds the clamp in bits 0-4 and the segment mask in bits 8-12."""
    op.flag("sync")
    mode = op.flag("up", "down", "bfly", "idx")
    op.type()
    d, in_range = op.destinations("b32")
    a, b, c = op.source(1, "b32"), op.source(2, "u32"), op.source(3, "u32")
    machine = op.machine
    lane, first_of_warp = machine.lane.astype(np.int64), machine.everyone & ~31

    def execute(mask: np.ndarray | None) -> None:
        step, clamp = (b & U32(31)).astype(np.int64), (c & U32(31)).astype(np.int64)
        segment = ((c >> U32(8)) & U32(31)).astype(np.int64)
        least, greatest = lane & segment, (lane & segment) | (clamp & ~segment)
        if mode == "up":
            from_lane = lane - step
            valid = from_lane >= greatest
        else:
            from_lane = {"down": lane + step, "bfly": lane ^ step, "idx": least | (step & ~segment)}[mode]
            valid = from_lane <= greatest
        source = first_of_warp + np.where(valid, from_lane, lane)
        if mask is not None:
            absent = mask & ~mask[source]
            if absent.any():
                message = "shfl.sync reads a lane which does not take part (inactive or exited)"
                machine.fault(op.instruction, np.flatnonzero(absent)[0], message, ExecError)
        write(d, op.broadcast(a)[source], mask)
        if in_range is not None:
            write(in_range, valid, mask)

    return execute


def vote(op: Decoder) -> Execute:
    op.flag("sync")
    mode, ty = op.flag("ballot", "all", "any", "uni"), op.type()
    p, members = op.predicate(1), op.source(2, "u32")
    d = op.destination(0, ty)

    def execute(mask: np.ndarray | None) -> None:
        active = _members(op, members, mask)
        true = op.broadcast(p()) & active
        if mode == "ballot":
            result = _ballot(true)
        else:
            lanes, count = active.reshape(-1, 32).sum(1), true.reshape(-1, 32).sum(1)
            result = {"all": count == lanes, "any": count > 0, "uni": (count == lanes) | (count == 0)}[mode]
        write(d, np.repeat(result, 32), mask)

    return execute


REDUCTIONS = {
    "add": (np.add, lambda ty: 0),
    "min": (np.minimum, lambda ty: int_range(ty)[1]),
    "max": (np.maximum, lambda ty: int_range(ty)[0]),
    "and": (np.bitwise_and, lambda ty: (1 << 32) - 1),
    "or": (np.bitwise_or, lambda ty: 0),
    "xor": (np.bitwise_xor, lambda ty: 0),
}


def reduce(op: Decoder) -> Execute:
    """redux.sync"""
    op.flag("sync")
    function, identity = REDUCTIONS[op.flag(*REDUCTIONS)]
    ty = op.type()
    a, d, members = op.source(1, ty), op.destination(0, ty), op.source(2, "u32")
    neutral = np.array([identity(ty) & 0xFFFFFFFF], U32).view(a.dtype)

    def execute(mask: np.ndarray | None) -> None:
        values = np.where(_members(op, members, mask), a, neutral).astype(a.dtype)
        write(d, np.repeat(function.reduce(values.reshape(-1, 32), axis=1, dtype=a.dtype), 32), mask)

    return execute


def match(op: Decoder) -> Execute:
    """match.any: lanes with the same value; match.all: all members, if all have the same value."""
    op.flag("sync")
    mode, ty = op.flag("any", "all"), op.type()
    d, same = op.destinations("b32")
    a, members = op.source(1, ty), op.source(2, "u32")

    def execute(mask: np.ndarray | None) -> None:
        active, values = _members(op, members, mask).reshape(-1, 32), _by_warp(op, a)
        equal = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        lanes = (equal * LANE_BITS).sum(2).astype(U32)
        if mode == "all":
            everyone = (active * LANE_BITS).sum(1).astype(U32)[:, None]
            agree = ((lanes == everyone) | ~active).all(1)
            lanes = np.where(agree[:, None], everyone, U32(0)) * np.ones((1, 32), U32)
            if same is not None:
                write(same, np.repeat(agree, 32), mask)
        write(d, lanes.reshape(-1), mask)

    return execute


def active_mask(op: Decoder) -> Execute:
    op.type()
    d, everyone = op.destination(0, "b32"), np.ones(op.machine.threads, bool)

    def execute(mask: np.ndarray | None) -> None:
        write(d, np.repeat(_ballot(everyone if mask is None else mask), 32), mask)

    return execute


def elect(op: Decoder) -> Execute:
    """elect.sync: the predicate of the lowest member, and its lane."""
    op.flag("sync")
    d, leader = op.destinations("b32")
    members = op.source(1, "u32")

    def execute(mask: np.ndarray | None) -> None:
        first = np.repeat(_members(op, members, mask).reshape(-1, 32).argmax(1), 32)
        write(d, first, mask)
        if leader is not None:
            write(leader, first == op.machine.lane, mask)

    return execute


HANDLERS = {
    "shfl": shuffle,
    "vote": vote,
    "redux": reduce,
    "match": match,
    "activemask": active_mask,
    "elect": elect,
}
