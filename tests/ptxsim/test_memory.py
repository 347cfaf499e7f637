"""Loads, stores, atomics, cp.async, barriers with results, arguments: what reaches memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptxsim import MemFault, Pointer, PTXError, Result, UnsupportedInstruction, load_ptx
from tests.ptxsim.ptx_cases import kernel

# r0: thread; d0, d1: the two buffers; d2, d3: the word of the thread in them.
PROLOGUE = (
    " ld.param.u64 d0, [pin]; ld.param.u64 d1, [pout]; mov.u32 r0, %tid.x; mul.wide.u32 d4, r0, 4;\n"
    " add.s64 d2, d0, d4; add.s64 d3, d1, d4;\n"
)
SHARED = ".shared .align 16 .b8 sm[512];\n"


def launch(body: str, args: list[Any], threads: int = 32, declarations: str = "", **options: Any) -> Result:
    return load_ptx(kernel(PROLOGUE + body, declarations)).launch("k", 1, threads, args, **options)


def test_atomics_of_threads_that_meet_go_in_lane_order() -> None:
    """64 threads on four cells each of add, max, float add and compare-and-swap."""
    body = (
        " and.b32 r1, r0, 3; mul.wide.u32 d5, r1, 4; add.s64 d5, d0, d5; atom.global.add.u32 r2, [d5], r0;\n"
        " red.global.max.s32 [d5+16], r0; st.global.u32 [d3], r2; cvt.rn.f32.u32 f0, r0;\n"
        " red.global.add.f32 [d5+32], f0; atom.global.cas.b32 r5, [d5+48], 0, r0;"
    )
    cells, returned = np.zeros(16, np.uint32), np.zeros(64, np.uint32)
    launch(body, [cells, returned], 64)
    for cell in range(4):
        threads = list(range(cell, 64, 4))
        assert cells[cell] == sum(threads)
        assert returned[threads].tolist() == [sum(threads[:i]) for i in range(len(threads))]
        assert cells[4 + cell] == max(threads)
        assert cells[8 + cell : 9 + cell].view(np.float32)[0] == sum(threads)
        assert cells[12 + cell] == next(thread for thread in threads if thread)


@pytest.mark.parametrize("order", ["", ".relaxed.gpu", ".acq_rel.gpu", ".acquire.sys", ".release.cta"])
def test_atomics_of_every_order_and_scope(order: str) -> None:
    body = f" atom{order}.global.add.s32 r1, [d0], -1; red{order}.global.add.s32 [d0+4], 2;"
    cells = np.zeros(2, np.int32)
    launch(body, [cells, None])
    assert cells.tolist() == [-32, 64]


SERIAL = {
    "add.s32": lambda value, thread: value + thread,
    "min.s32": min,
    "max.s32": max,
    "and.b32": lambda value, thread: value & thread,
    "or.b32": lambda value, thread: value | thread,
    "xor.b32": lambda value, thread: value ^ thread,
    "exch.b32": lambda value, thread: thread,
    "inc.u32": lambda value, thread: 0 if value >= thread else value + 1,
    "dec.u32": lambda value, thread: thread if value == 0 or value > thread else value - 1,
}


@pytest.mark.parametrize("operation", SERIAL)
@pytest.mark.parametrize("start", [0, 3, 30, 0x155])
def test_atomic_operations_one_after_the_other(operation: str, start: int) -> None:
    cells, returned = np.array([start], np.int32), np.zeros(32, np.int32)
    launch(f" atom.global.{operation} r1, [d0], r0; st.global.u32 [d3], r1;", [cells, returned])
    value = start
    for thread in range(32):
        assert returned[thread] == value
        value = SERIAL[operation](value, thread)
    assert cells[0] == value


def test_packed_half_atomics() -> None:
    halves = np.zeros(2, np.float16)
    launch(" mov.b32 r1, 0x3c004000; red.global.add.noftz.f16x2 [d0], r1;", [halves, None])
    assert halves.tolist() == [64, 32]


def test_cp_async_zeroes_what_is_beyond_the_source_size() -> None:
    body = (
        " mov.u32 r5, sm; shl.b32 r6, r0, 4; add.u32 r6, r5, r6; mul.wide.u32 d5, r0, 16; add.s64 d6, d0, d5;\n"
        " add.s64 d7, d1, d5; and.b32 r7, r0, 15; cp.async.ca.shared.global [r6], [d6], 16, r7;\n"
        " cp.async.commit_group; cp.async.wait_group 0; cvt.u64.u32 d8, r6; cvta.shared.u64 d8, d8;\n"
        " ld.v4.u32 {r1,r2,r3,r4}, [d8]; st.global.v4.u32 [d7], {r1,r2,r3,r4};"
    )
    data = np.random.default_rng(0).integers(1, 256, 512).astype(np.uint8)
    out = np.full((32, 16), 255, np.uint8)
    launch(body, [data, out], declarations=SHARED)
    for thread in range(32):
        count = thread & 15
        assert np.array_equal(out[thread, :count], data[16 * thread : 16 * thread + count])
        assert not out[thread, count:].any()


def test_cp_async_reads_nothing_of_an_ignored_source() -> None:
    body = (
        " mov.u32 r5, sm; shl.b32 r6, r0, 4; add.u32 r6, r5, r6; setp.ge.u32 p0, r0, 0;\n"
        " cp.async.cg.shared.global [r6], [d0+100000], 16, p0; cp.async.wait_all; ld.shared.u32 r1, [r6];\n"
        " st.global.u32 [d3], r1;"
    )
    out = np.ones(32, np.uint32)
    launch(body, [np.zeros(4, np.uint8), out], declarations=SHARED)
    assert not out.any()


@pytest.mark.parametrize(("operation", "want"), [("popc.u32", 5), ("or.pred", 1), ("and.pred", 0)])
def test_reducing_barrier(operation: str, want: int) -> None:
    if operation.endswith("pred"):
        body = f" setp.lt.u32 p0, r0, 5; bar.red.{operation} p1, 0, p0; selp.u32 r1, 1, 0, p1; st.global.u32 [d3], r1;"
    else:
        body = f" setp.lt.u32 p0, r0, 5; bar.red.{operation} r1, 0, p0; st.global.u32 [d3], r1;"
    out = np.full(64, 77, np.uint32)
    launch(body, [None, out], 64)
    assert (out == want).all()


def test_narrow_loads_extend_and_constants_are_initialised() -> None:
    body = (
        " cvt.u64.u32 d5, r0; add.s64 d5, d0, d5; ld.global.nc.s8 h0, [d5]; cvt.s32.s16 r1, h0;\n"
        " ld.global.u8 r2, [d5]; add.s32 r1, r1, r2; ld.const.u32 r3, [tab+4]; add.u32 r1, r1, r3;\n"
        " st.global.u32 [d3], r1;"
    )
    data, out = np.arange(-16, 16, dtype=np.int8), np.zeros(32, np.int32)
    launch(body, [data, out], declarations=".const .align 4 .b32 tab[2] = {7, 1000};\n")
    assert np.array_equal(out, data.astype(int) + data.view(np.uint8) + 1000)


@pytest.mark.parametrize(
    "load",
    [
        "ld.global.L1::evict_last.u32",
        "ld.global.L1::evict_first.L2::128B.u32",
        "ld.global.cg.u32",
        "ld.volatile.global.u32",
        "ld.acquire.gpu.global.u32",
        "ld.global.nc.L1::no_allocate.u32",
    ],
)
def test_cache_hints_and_orders_change_no_value(load: str) -> None:
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(f" {load} r1, [d2]; st.global.u32 [d3], r1;", [data, out])
    assert np.array_equal(out, data)


def test_cache_policies_are_accepted() -> None:
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = (
        " createpolicy.fractional.L2::evict_first.b64 d9, 1.0;\n"
        " ld.global.L2::cache_hint.u32 r1, [d2], d9; st.global.L1::evict_last.u32 [d3], r1;"
    )
    launch(body, [data, out])
    assert np.array_equal(out, data)


# ------------------------------------------------------------------------------------ arguments
def test_the_same_array_twice_is_one_buffer() -> None:
    data = np.zeros(32, np.uint32)
    launch(" st.global.u32 [d3], r0; ld.global.u32 r1, [d2]; add.u32 r1, r1, 1; st.global.u32 [d2], r1;", [data, data])
    assert data.tolist() == list(range(1, 33))


def test_pointers_into_one_array_alias_and_keep_to_their_windows() -> None:
    data = np.zeros(1024, np.uint8)
    args = [Pointer(data, 256, 128), Pointer(data, 512, 128)]
    launch(" ld.global.u32 r1, [d2+256]; add.u32 r1, r1, 3; st.global.u32 [d3], r1;", args)
    assert np.array_equal(data.view(np.uint32), [3 if 128 <= i < 160 else 0 for i in range(256)])
    with pytest.raises(MemFault, match=r"byte offset 384 of arg 0 \(pin\)"):
        launch(" ld.global.u32 r1, [d0+128];", args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([np.zeros((4, 4))[:, :2], None], "contiguous"),
        ([None], "takes 2 parameters"),
        ([1.5, None], "float is ambiguous"),
        ([b"123", None], "has 8 bytes, got 3"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list, message: str) -> None:
    with pytest.raises(PTXError, match=message):
        load_ptx(kernel("")).launch("k", 1, 32, arguments)


@pytest.mark.parametrize(
    "instruction", ["frobnicate.b32 r0, r1;", "add.weird.s32 r0, r1, r2;", "tcgen05.ld.b32 r0, [r1];"]
)
def test_unknown_instructions_are_named(instruction: str) -> None:
    with pytest.raises(UnsupportedInstruction, match=instruction.split(".")[0]):
        load_ptx(kernel(" " + instruction)).launch("k", 1, 32, [None, None])


def test_unsupported_instructions_may_be_left_out_of_the_path() -> None:
    body = " setp.eq.u32 p0, 1, 0; @!p0 bra DONE; frobnicate.b32 r0, r1;\nDONE: st.global.u32 [d3], r0;"
    out = np.zeros(32, np.uint32)
    launch(body, [None, out], lazy_unsupported=True)
    assert out.tolist() == list(range(32))
