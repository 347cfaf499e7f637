"""Unpacking 6-bit weights in registers: both paths against the drawing of the layout, for every byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from ptq4arvg_kernels.backends.triton import int6, support
from ptq4arvg_kernels.backends.triton.launch import Launch, start
from tests.kernels.triton_cases import compiled_ptx, device, edited, recorded

compiled = pytest.mark.skipif(support.interpreted(), reason="looks at the compiled kernel")
BLOCK = 1024


@triton.jit
def unpack_kernel(a, b, c, out, count, ASM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = int6.unpack(tl.load(a + offsets), tl.load(b + offsets), tl.load(c + offsets), ASM)
    tl.store(out + offsets, w0)
    tl.store(out + count + offsets, w1)
    tl.store(out + 2 * count + offsets, w2)
    tl.store(out + 3 * count + offsets, w3)


def _every_byte() -> torch.Tensor:
    """uint8 ``[3, 16384]``: every byte of each plane beside every combination of the others' spare bits, and beside
    other random codes."""
    spare = np.arange(256 * 16)
    whole, others = spare % 256, spare // 256
    columns = [np.empty(0, np.uint8)] * 3
    rng = np.random.default_rng(0)
    for plane in range(3):
        parts = [(others % 4), (others // 4)]
        for i in range(3):
            byte = whole if i == plane else (rng.integers(0, 64, spare.size) << 2) | parts.pop()
            columns[i] = np.concatenate([columns[i], byte.astype(np.uint8)])
    random = rng.integers(0, 256, (3, 4096)).astype(np.uint8)
    return torch.from_numpy(np.concatenate([np.stack(columns), random], axis=1))


def _launch(planes: torch.Tensor, asm: bool, kernel: object = unpack_kernel) -> torch.Tensor:
    count = planes.shape[1]
    out = torch.full((4, count), 99, dtype=torch.int8)
    a, b, c = (plane.clone() for plane in planes)
    arguments = {"a": a, "b": b, "c": c, "out": out, "count": count}
    start(Launch(kernel, (count // BLOCK,), arguments, {"ASM": asm, "BLOCK": BLOCK}, 4, 1))
    return out


def _expected(planes: torch.Tensor) -> np.ndarray:
    """The drawing in int6.py, one number at a time: six bits, two's complement, times 4."""
    a, b, c = planes.numpy().astype(np.int64)
    codes = np.stack([a >> 2, b >> 2, c >> 2, (a & 3) << 4 | (b & 3) << 2 | (c & 3)])
    return 4 * ((codes ^ 32) - 32)


@pytest.mark.parametrize("asm", [False, pytest.param(True, marks=compiled)], ids=["plain", "assembly"])
def test_every_byte(asm: bool) -> None:
    planes = _every_byte()
    with device():
        got = _launch(planes, asm)
    assert np.array_equal(got.numpy(), _expected(planes))


@compiled
def test_assembly_is_nine_instructions_for_sixteen_codes() -> None:
    """And no byte is taken out of its register: what the plain twin costs, and why there are two paths."""
    counts = {}
    for asm in (True, False):
        with recorded() as launches:
            _launch(_every_byte(), asm)
        ptx = compiled_ptx(launches[0], 80)
        counts[asm] = sum(ptx.count(name) for name in ("and.b", "or.b", "xor.b", "lop3.b", "shl.b", "shr.u", "prmt.b"))
        assert ("prmt" in ptx) != asm
    groups = BLOCK // 128 // 4  # registers of four bytes per plane and thread
    addressing = 8
    assert counts[True] <= 9 * groups + addressing
    assert counts[False] > 2 * counts[True]


@compiled
@pytest.mark.parametrize(
    ("old", "new"), [("0x30303030", "0x30303020"), ("shl.b32 u, $4, 6", "shl.b32 u, $4, 5"), ("$2, $6", "$2, $5")]
)
def test_a_wrong_instruction_is_noticed(old: str, new: str) -> None:
    assert old in int6.UNPACK.value
    helper = edited(int6.unpack, "UNPACK", repr(int6.UNPACK.value.replace(old, new)))
    wrong = edited(unpack_kernel, "int6.unpack", "unpack", unpack=helper)
    planes = _every_byte()
    with device():
        assert not np.array_equal(_launch(planes, True, wrong).numpy(), _expected(planes))


def test_a_wrong_shift_of_the_twin_is_noticed() -> None:
    if support.interpreted():
        pytest.skip("edits a compiled function")
    helper = edited(int6.unpack, "(b << 4) & 0x30", "(b << 2) & 0x30")
    wrong = edited(unpack_kernel, "int6.unpack", "unpack", unpack=helper)
    planes = _every_byte()
    with device():
        assert not np.array_equal(_launch(planes, False, wrong).numpy(), _expected(planes))
