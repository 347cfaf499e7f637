"""Races, uninitialised reads, faults, deadlocks: each is found, and correct synchronisation is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptxsim import DeadlockError, ExecError, HazardError, MemFault, Result, load_ptx
from tests.ptxsim.ptx_cases import kernel

# r0: thread, r7: warp, r6: its word in shared memory, r8: the word of a thread of the other warp.
PROLOGUE = (
    " mov.u32 r0, %tid.x; shl.b32 r1, r0, 2; mov.u32 r5, sm; add.u32 r6, r5, r1; shr.u32 r7, r0, 5;\n"
    " xor.b32 r2, r1, 128; add.u32 r8, r5, r2; ld.param.u64 d0, [pin];\n"
)
COPY = " shl.b32 r9, r0, 4; add.u32 r9, r5, r9; cp.async.cg.shared.global [r9], [d0], 16;"
SCHEDULES = ["lockstep", "warp_serial", "warp_reverse", "random"]


def launch(body: str, threads: int = 64, **options: Any) -> Result:
    program = load_ptx(kernel(PROLOGUE + body, ".shared .align 16 .b8 sm[4096];\n"))
    return program.launch("k", 1, threads, [np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)], **options)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("race-RAW", " st.shared.u32 [r6], r0; ld.shared.u32 r9, [r8];"),
        ("race-WAR", " st.shared.u32 [r6], r0; bar.sync 0; ld.shared.u32 r9, [r8]; st.shared.u32 [r6], r9;"),
        ("race-WAW", " st.shared.u32 [sm], r0;"),
        ("race-RAW", " st.shared.u32 [sm], 0; bar.sync 0; red.shared.add.u32 [sm], 1; ld.shared.u32 r9, [sm];"),
        ("uninitialised", " ld.shared.u32 r9, [r6];"),
        ("uninitialised", " st.shared.u8 [r6], 1; ld.shared.u8 r9, [r6+1];"),
        ("cp.async-pending", COPY + " cp.async.commit_group; ld.shared.u32 r9, [r9];"),
        ("cp.async-pending", COPY + " cp.async.wait_group 0; ld.shared.u32 r9, [r9];"),  # never committed
        ("race-RAW", COPY + " cp.async.wait_all; xor.b32 r9, r9, 512; ld.shared.u32 r9, [r9];"),  # no barrier
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hazard_is_found(kind: str, body: str, schedule: str) -> None:
    with pytest.raises(HazardError, match=kind) as caught:
        launch(body, schedule=schedule)
    assert all(finding["line"] for finding in caught.value.findings)


@pytest.mark.parametrize(
    "body",
    [
        " st.shared.u32 [r6], r0; bar.sync 0; ld.shared.u32 r9, [r8];",
        " st.shared.u32 [r6], r0; bar.sync 0; ld.shared.u32 r9, [r8]; bar.sync 0; st.shared.u32 [r6], r9;",
        " st.shared.u32 [sm], 7;",  # the same value
        " st.shared.u32 [sm], 0; bar.sync 0; red.shared.add.u32 [sm], 1; bar.sync 0; ld.shared.u32 r9, [sm];",
        " add.u32 r9, r0, r5; st.shared.u8 [r9], r0; bar.sync 0; ld.shared.u8 r9, [r9];",  # neighbouring bytes
        " setp.lt.u32 p0, r0, 40; @p0 bra Y; exit;\nY: bar.sync 0;",  # exited threads count as arrived
        " setp.lt.u32 p0, r0, 32; @p0 bra Y; bar.sync 0;\nY: ret;",
        COPY + " cp.async.wait_all; ld.shared.u32 r9, [r9];",
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_correct_synchronisation_is_left_alone(body: str, schedule: str) -> None:
    assert launch(body, schedule=schedule).findings == []


PRODUCER_CONSUMER = (
    " setp.eq.u32 p0, r7, 0; @!p0 bra CONSUME; st.shared.u32 [r6], r0; bar.arrive 1, 64; bra DONE;\n"
    "CONSUME: {} add.u32 r8, r5, r1; ld.shared.u32 r9, [r8+-128];\nDONE:"
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_named_barriers_order_a_producer_and_a_consumer(schedule: str) -> None:
    assert not launch(PRODUCER_CONSUMER.format("bar.sync 1, 64;"), schedule=schedule).findings
    with pytest.raises(HazardError, match="race-"):
        launch(PRODUCER_CONSUMER.format(""), schedule=schedule)


@pytest.mark.parametrize(("distance", "ordered"), [(128, True), (256, False)])
def test_a_barrier_of_two_warps_does_not_order_a_third(distance: int, ordered: bool) -> None:
    body = (
        " setp.lt.u32 p0, r7, 2; st.shared.u32 [r6], r0; @!p0 bra X; bar.sync 2, 64;\n"
        f"X: xor.b32 r2, r1, {distance}; add.u32 r8, r5, r2; @p0 ld.shared.u32 r9, [r8];"
    )
    if ordered:
        assert not launch(body, 128).findings
    else:
        with pytest.raises(HazardError, match="race-RAW"):
            launch(body, 128)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("reader", "ordered"), [(0, False), (1, False), (2, True)])
def test_a_write_after_reads_of_several_warps_needs_all_of_them(reader: int, ordered: bool, schedule: str) -> None:
    """Warp 2 and one reader meet at a barrier, or all of them, before warp 2 writes."""
    meet = "bar.sync 3, 128;" if ordered else f"setp.eq.u32 p1, r7, {reader}; or.pred p1, p1, p2; @p1 bar.sync 2, 64;"
    body = (
        " setp.eq.u32 p0, r0, 0; @p0 st.shared.u32 [sm], 5; bar.sync 0; setp.lt.u32 p3, r7, 2;\n"
        " setp.eq.u32 p2, r7, 2; setp.gt.u32 p4, r7, 1; @p4 bar.sync 1, 64;\n"  # barriers of some warps only
        f" @p3 ld.shared.u32 r9, [sm]; {meet} @p2 st.shared.u32 [sm], r7;"
    )
    if ordered:
        assert not launch(body, 128, schedule=schedule).findings
    else:
        with pytest.raises(HazardError, match=r"race-(WAR|RAW)"):
            launch(body, 128, schedule=schedule)


def test_a_load_over_the_end_of_an_allocation() -> None:
    program = load_ptx(kernel(" ld.param.u64 d0, [pin]; ld.global.u64 d1, [d0+8];"))
    with pytest.raises(MemFault, match="byte offset 8 of arg 0"):
        program.launch("k", 1, 32, [np.zeros(14, np.uint8), None])


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("out-of-bounds shared", " ld.shared.u32 r9, [r5+4096];"),
        ("out-of-bounds shared", " mov.u32 r9, 0; st.shared.u32 [r9], r0;"),
        ("byte offset 4096 of arg 0", " ld.global.u32 r9, [d0+4096];"),
        ("4 bytes before the start of arg 0", " ld.global.u32 r9, [d0+-4];"),
        ("misaligned", " ld.global.u32 r9, [d0+2];"),
        ("not inside any allocation", " cvt.u32.u64 r9, d0; cvt.u64.u32 d0, r9; ld.global.u32 r9, [d0];"),
    ],
)
def test_fault_names_the_place(message: str, body: str) -> None:
    with pytest.raises(MemFault, match=message):
        launch(body)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (
            "part of the lanes",
            " setp.lt.u32 p0, r0, 16; @p0 bra Y; exit;\nY: ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r9}, [r5];",
        ),
        ("part of the lanes", " and.b32 r2, r0, 1; setp.eq.u32 p0, r2, 0; @p0 bar.sync 1, 32;"),
        ("different bar.sync", " setp.lt.u32 p0, r0, 16; @p0 bra Y; bar.sync 0; exit;\nY: bar.sync 0;"),
        ("trap executed", " trap;"),
    ],
)
def test_undefined_execution_is_an_error(message: str, body: str) -> None:
    with pytest.raises(ExecError, match=message):
        launch(body)


@pytest.mark.parametrize(
    "body",
    [
        " setp.eq.u32 p0, r7, 0; @p0 bra Y; bar.sync 1, 64; exit;\nY: bar.sync 2, 64;",  # each warp at its own barrier
        " and.b32 r2, r0, 1; setp.eq.u32 p0, r2, 0; @p0 bra Y; bar.sync 1;\nY: bar.sync 0;",  # half of each warp
    ],
)
def test_threads_waiting_for_each_other(body: str) -> None:
    with pytest.raises(DeadlockError, match="32 thread"):
        launch(body)


def test_bytes_that_have_not_arrived_are_poisoned() -> None:
    """So that a missing wait shows in the numbers too."""
    body = COPY + " cp.async.commit_group; ld.shared.u32 r10, [r9]; ld.param.u64 d1, [pout]; st.global.u32 [d1], r10;"
    out = np.zeros(1, np.uint32)
    program = load_ptx(kernel(PROLOGUE + body, ".shared .align 16 .b8 sm[4096];\n"))
    program.launch("k", 1, 32, [np.zeros(16, np.uint8), out], hazards="off")
    assert out[0] == 0xCDCDCDCD


def test_endless_loop_ends() -> None:
    with pytest.raises(ExecError, match="limit"):
        launch(" \nL: bra L;", max_steps=20000)


def test_findings_can_be_recorded_or_switched_off() -> None:
    race = " st.shared.u32 [r6], r0; ld.shared.u32 r9, [r8];"
    (finding,) = launch(race, hazards="record").findings
    assert finding["kind"] == "race-RAW"
    assert finding["bytes"] == 256
    assert launch(race, hazards="off").findings == []


@pytest.mark.parametrize("option", [{"hazards": "on"}, {"schedule": "fifo"}])
def test_unknown_options_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="one of"):
        launch("", **option)
