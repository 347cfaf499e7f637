"""Counters on access patterns with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptxsim import load_ptx
from tests.ptxsim.ptx_cases import kernel

PROLOGUE = " mov.u32 r0, %tid.x; mov.u32 r5, sm; ld.param.u64 d0, [pin];\n"
LOADS = {
    1: ("u8", "r8"),
    2: ("u16", "r8"),
    4: ("u32", "r8"),
    8: ("v2.u32", "{r8,r9}"),
    16: ("v4.u32", "{r8,r9,r10,r11}"),
}


def metrics(body: str) -> dict[str, Any]:
    """Of 64 threads, in shared memory that nothing has written."""
    program = load_ptx(kernel(PROLOGUE + body, ".shared .align 16 .b8 sm[32768];\n"))
    return program.launch("k", 1, 64, [np.zeros(65536, np.uint8), None], hazards="off").metrics()


@pytest.mark.parametrize(
    ("stride", "size", "conflicts"),
    [
        (4, 4, 1),
        (8, 4, 2),
        (128, 4, 32),
        (12, 4, 1),
        (0, 4, 1),
        (16, 16, 1),
        (8, 8, 1),
        (32, 16, 2),
        (128, 16, 8),
        (2, 2, 1),
        (1, 1, 1),
    ],
)
def test_bank_conflicts_of_shared_loads(stride: int, size: int, conflicts: int) -> None:
    ty, destination = LOADS[size]
    got = metrics(f" mul.lo.u32 r6, r0, {stride}; add.u32 r6, r6, r5; ld.shared.{ty} {destination}, [r6];")
    assert got["sld_bank_conflict_factor"] == conflicts


@pytest.mark.parametrize(
    ("stride", "swizzled", "conflicts"),
    [(16, False, 1), (64, False, 4), (128, False, 8), (80, False, 1), (64, True, 1)],
)
def test_bank_conflicts_of_ldmatrix(stride: int, swizzled: bool, conflicts: int) -> None:
    """Swizzled: chunk ^ (row / 2 % 4)."""
    chunk = " shr.u32 r7, r6, 1; and.b32 r7, r7, 3; shl.b32 r7, r7, 4;" if swizzled else " mov.u32 r7, 0;"
    got = metrics(
        f" and.b32 r6, r0, 31;{chunk} mul.lo.u32 r6, r6, {stride}; xor.b32 r6, r6, r7; add.u32 r6, r6, r5;\n"
        " ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r8,r9,r10,r11}, [r6];"
    )
    assert got["ldmatrix_bank_conflict_factor"] == conflicts


@pytest.mark.parametrize(
    ("stride", "size", "sectors"),
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (64, 4, 32), (16, 16, 16), (1, 1, 1), (0, 4, 1), (3, 1, 3)],
)
def test_sectors_of_global_loads(stride: int, size: int, sectors: int) -> None:
    ty, destination = LOADS[size]
    got = metrics(f" mul.wide.u32 d2, r0, {stride}; add.s64 d2, d2, d0; ld.global.{ty} {destination}, [d2];")
    assert got["global_load_sector_bytes"] == 2 * 32 * sectors
    assert got["global_load_bytes"] == 64 * size
    assert got["global_load_efficiency"] == round(64 * size / (64 * sectors), 4)


def test_instructions_are_counted_by_warps_that_execute_them() -> None:
    got = metrics(
        " add.u32 r1, r0, 1; bar.sync 0; setp.lt.u32 p0, r0, 32; @p0 bra X; add.u32 r1, r1, 1; add.u32 r1, r1, 1;\n"
        "X: cvt.u64.u32 d3, r1;"
    )
    assert got["barriers"] == 2
    assert got["classes"]["cvt"] == 2
    assert got["classes"]["alu"] == 2 + 2 + 2
    assert got["thread_instructions"] == 32 * got["warp_instructions"]


def test_report_names_the_worst_line() -> None:
    program = load_ptx(
        kernel(
            PROLOGUE + " mul.wide.u32 d2, r0, 32; add.s64 d2, d2, d0; ld.global.u8 r8, [d2];",
            ".shared .align 16 .b8 sm[16];\n",
        )
    )
    report = program.launch("k", 1, 64, [np.zeros(65536, np.uint8), None]).report()
    assert "ld.global.u8 r8, [d2]" in report
    assert "64 B 64 sectors" in report
