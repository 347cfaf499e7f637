"""Warp-level instructions, divergence and reconvergence."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest

from tests.ptxsim import ExecError, load_ptx
from tests.ptxsim.ptx_cases import check, kernel, run, signed, unsigned

VALUES = [random.Random(3).getrandbits(32) for _ in range(64)]


def per_warp(function: Callable[[list[int]], int], values: list[int] = VALUES) -> list[int]:
    return [function(values[:32])] * 32 + [function(values[32:])] * 32


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("delta", [0, 1, 3, 5, 9, 31])
def test_shuffle(mode: str, width: int, delta: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    instructions = f" shfl.sync.{mode}.b32 r8|p9, r0, {delta}, {clamp}, -1; mov.u32 r9, r8; @!p9 xor.b32 r9, r9, -1;"
    for thread, got in enumerate(run(instructions, [("r", VALUES)], "r9")):
        lane = thread % 32
        segment = lane // width * width
        source = {
            "up": lane - delta,
            "down": lane + delta,
            "bfly": lane ^ delta,
            "idx": segment + (delta & (width - 1)),
        }[mode]
        inside = source >= segment if mode == "up" else source < segment + width
        want = VALUES[thread - lane + source] if inside else VALUES[thread] ^ 0xFFFFFFFF
        assert got == want, thread


def test_shuffle_from_an_exited_lane_is_an_error() -> None:
    body = " mov.u32 r0, %tid.x; setp.eq.u32 p0, r0, 3; @p0 exit; shfl.sync.idx.b32 r1, r0, 3, 31, -1;"
    with pytest.raises(ExecError, match="does not take part"):
        load_ptx(kernel(body)).launch("k", 1, 32, [None, None])


def test_ballot_gives_every_lane_its_bit() -> None:
    flags = [value & 1 for value in VALUES]
    check(
        " vote.sync.ballot.b32 r9, p0, -1; mov.u32 r8, %laneid; shr.u32 r9, r9, r8; and.b32 r9, r9, 1;",
        [("p", flags)],
        "r9",
        lambda flag: flag,
    )


def test_vote_any_all_and_uniform() -> None:
    instructions = (
        " vote.sync.any.pred p1, p0, -1; vote.sync.all.pred p2, p0, -1; vote.sync.uni.pred p3, p0, -1;"
        " selp.u32 r9, 4, 0, p1; @p2 add.u32 r9, r9, 2; @p3 add.u32 r9, r9, 1;"
    )
    flags = [0] * 32 + [1] * 32 + [0, 1] * 16
    assert run(instructions, [("p", flags)], "r9") == [1] * 32 + [7] * 32 + [4] * 32


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.u32", lambda values: unsigned(sum(values), 32)),
        ("min.s32", lambda values: unsigned(min(signed(value, 32) for value in values), 32)),
        ("max.u32", max),
        ("xor.b32", lambda values: reduce(lambda a, b: a ^ b, values)),
        ("and.b32", lambda values: reduce(lambda a, b: a & b, values)),
        ("or.b32", lambda values: reduce(lambda a, b: a | b, values)),
    ],
)
def test_redux(name: str, function: Callable[[list[int]], int]) -> None:
    assert run(f" redux.sync.{name} r9, r0, -1;", [("r", VALUES)], "r9") == per_warp(function)


def test_match() -> None:
    few = [value % 5 for value in VALUES]
    got = run(" match.any.sync.b32 r9, r0, -1;", [("r", few)], "r9")
    for thread, lanes in enumerate(got):
        first = thread - thread % 32
        assert lanes == sum(1 << lane for lane in range(32) if few[first + lane] == few[thread])
    same = [7] * 32 + [7] * 31 + [8]
    got = run(" match.all.sync.b32 r8|p1, r0, -1; selp.u32 r9, r8, 5, p1;", [("r", same)], "r9")
    assert got == [0xFFFFFFFF] * 32 + [5] * 32


def test_elect_chooses_the_lowest_member() -> None:
    instructions = " elect.sync r8|p1, 0xFFFFFFF0; selp.u32 r9, 100, 0, p1; add.u32 r9, r9, r8;"
    assert run(instructions, [("r", VALUES[:32])], "r9") == [104 if lane == 4 else 4 for lane in range(32)]


def test_active_mask_of_a_branch() -> None:
    body = (
        " ld.param.u64 d0, [pout]; mov.u32 r0, %tid.x; mul.wide.u32 d1, r0, 4; add.s64 d0, d0, d1; mov.u32 r1, 0;\n"
        " setp.lt.u32 p0, r0, 5; @!p0 bra DONE; activemask.b32 r1;\nDONE: st.global.u32 [d0], r1;"
    )
    out = np.zeros(32, np.uint32)
    load_ptx(kernel(body)).launch("k", 1, 32, [None, out])
    assert out.tolist() == [31] * 5 + [0] * 27


def test_lanes_of_a_divergent_loop_meet_at_a_shuffle() -> None:
    instructions = (
        " mov.u32 r8, 0; and.b32 r7, r0, 7;\n"
        "LOOP: add.u32 r8, r8, 1; setp.lt.u32 p1, r8, r7; @p1 bra LOOP; shfl.sync.idx.b32 r9, r8, 3, 31, -1;"
    )
    want = [max(VALUES[3] & 7, 1)] * 32 + [max(VALUES[35] & 7, 1)] * 32
    assert run(instructions, [("r", VALUES)], "r9") == want


def test_indexed_branch() -> None:
    instructions = (
        " and.b32 r1, r0, 3; mov.u32 r9, 9;\n"
        "TABLE: .branchtargets A, B, C, D;\n"
        " brx.idx r1, TABLE;\n"
        "A: mov.u32 r9, 10; bra E;\nB: mov.u32 r9, 11; bra E;\nC: mov.u32 r9, 12; bra E;\nD: mov.u32 r9, 13;\n"
        "E: mov.u32 r8, 0;"
    )
    check(instructions, [("r", VALUES)], "r9", lambda value: 10 + value % 4)
