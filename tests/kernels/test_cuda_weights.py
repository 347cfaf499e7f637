"""Weights of the CUDA backend: their order in memory against its drawing, unpacking in registers, the cache."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4arvg_kernels.backends.cuda import weights
from ptq4arvg_kernels.packing import pack
from tests.kernels.kernel_cases import generator
from tests.ptxsim import load_ptx
from tests.ptxsim.cuda_sources import FLAGS, SOURCES
from tests.ptxsim.nvcc import compile_ptx, find_nvcc

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc on the path")
UNPACK_KERNEL = Path(__file__).with_name("unpack6.cu")


def _codes(out_features: int, in_features: int, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    shape = (out_features, in_features)
    return torch.randint(-top, top + 1, shape, generator=generator(bits)).to(torch.int8)


# --- order in memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("out_features", [2, 32, 34, 130])
@pytest.mark.parametrize("in_features", [1, 64, 127, 128, 129, 515])
def test_bricks_round_trip(bits: int, paired: bool, out_features: int, in_features: int) -> None:
    qweight = pack(_codes(out_features - (not paired), in_features, bits), bits)
    bricks = weights.pack_bricks(qweight, bits, in_features, paired)
    assert bricks.dtype == torch.uint8
    assert bricks.is_contiguous()
    assert bricks.numel() == weights.packed_bytes(len(qweight), in_features, bits)
    assert torch.equal(weights.unpack_bricks(bricks, len(qweight), bits, in_features, paired), qweight)


def _operand_place(channel: int, k: int) -> tuple[int, int, int, int, int, int]:
    """(strip, brick, operand, lane, register, byte) of a code, from the drawing of ``mma.m16n8k32`` in the PTX ISA:
    register 0 holds row g, 1 row g + 8, 2 and 3 the same rows 16 k further; bytes 4 t to 4 t + 3 of a row are lane
    4 g + t's."""
    strip, inside = divmod(channel, 32)
    g, place = divmod(inside, 4)  # a lane ends with the channels 4 g to 4 g + 3
    tile, lower_half = divmod(place, 2)  # row g or g + 8 of a tile of 16
    brick, column = divmod(k, 64)
    step, column = divmod(column, 32)
    right_half, column = divmod(column, 16)
    t, byte = divmod(column, 4)
    return strip, brick, 2 * step + tile, 4 * g + t, 2 * right_half + lower_half, byte


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("bits", [6, 8])
def test_every_code_is_where_the_drawing_says(bits: int, paired: bool) -> None:
    rows, width = 70, 200
    codes = _codes(rows, width, bits)
    bricks = weights.pack_bricks(pack(codes, bits), bits, width, paired)
    assert bricks.shape == (4, 4, 2048 * bits // 8)
    chunks = bricks.view(4, 4, -1, 32, 4, 4).numpy()  # strip, brick, chunk, lane, word, byte
    expected = np.zeros_like(chunks)
    for channel in range(rows):
        stored = channel % 2 * (rows // 2) + channel // 2 if paired else channel
        for k in range(width):
            code = int(codes[stored, k])
            strip, brick, operand, lane, register, byte = _operand_place(channel, k)
            if bits == 8:
                expected[strip, brick, operand, lane, register, byte] = code & 255
            elif register < 3:
                expected[strip, brick, register, lane, operand, byte] |= (code & 63) << 2
            else:
                for plane in range(3):
                    expected[strip, brick, plane, lane, operand, byte] |= (code & 63) >> (4 - 2 * plane) & 3
    assert np.array_equal(chunks, expected)


def test_bytes_that_pack_never_makes() -> None:
    qweight = pack(_codes(33, 64, 6), 6)
    qweight[32, 3] = 0
    with pytest.raises(ValueError, match=r"row 32.*corrupt"):
        weights.pack_bricks(qweight, 6, 64)


# --- unpacking --------------------------------------------------------------------------------------------------------


@cache
def _unpack_ptx() -> str:
    return compile_ptx(UNPACK_KERNEL, flags=[*FLAGS, f"-I{SOURCES}"])


def _unpacked(planes: np.ndarray, ptx: str) -> np.ndarray:
    count = planes.shape[1]
    out = np.zeros((4, count), np.uint8)
    load_ptx(ptx).launch("unpack6_kernel", count // 4 // 128, 128, [planes, out, count // 4])
    return out.view(np.int8)


def _every_byte() -> np.ndarray:
    """uint8 ``[3, 16384]``: every byte of each plane beside every combination of the others' spare bits, and beside
    other random codes; and random bytes."""
    rng = np.random.default_rng(0)
    parts = []
    for plane in range(3):
        columns = (rng.integers(0, 64, (3, 4096)) << 2).astype(np.uint8)
        others = [i for i in range(3) if i != plane]
        columns[others[0]] |= np.repeat(np.arange(4, dtype=np.uint8), 1024)
        columns[others[1]] |= np.tile(np.repeat(np.arange(4, dtype=np.uint8), 256), 4)
        columns[plane] = np.tile(np.arange(256, dtype=np.uint8), 16)
        parts.append(columns)
    parts.append(rng.integers(0, 256, (3, 4096)).astype(np.uint8))
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def _left_justified(planes: np.ndarray) -> np.ndarray:
    """The drawing in int6.cuh, one number at a time: six bits, two's complement, times 4."""
    a, b, c = planes.astype(np.int64)
    codes = np.stack([a >> 2, b >> 2, c >> 2, (a & 3) << 4 | (b & 3) << 2 | (c & 3)])
    return 4 * ((codes ^ 32) - 32)


@needs_nvcc
def test_every_byte() -> None:
    planes = _every_byte()
    assert np.array_equal(_unpacked(planes, _unpack_ptx()), _left_justified(planes))


LOGIC = ("and.b", "or.b", "xor.b", "lop3.b", "shl.b", "shr.u", "prmt.b", "bfe.", "bfi.")


@needs_nvcc
def test_sixteen_codes_take_nine_operations() -> None:
    """The kernel has one call, and takes no byte out of its register."""
    body = _unpack_ptx().partition("ld.global")[2]
    assert sum(body.count(name) for name in LOGIC) == 9
    assert "prmt" not in body


@needs_nvcc
@pytest.mark.parametrize("edit", [("0xE4", "0xD4"), ("shl.b32", "shr.b32"), ("-50529028", "-50529029")], ids=str)
def test_a_wrong_instruction_is_noticed(edit: tuple[str, str]) -> None:
    """A wrong table of the three-operand logic, shift, mask."""
    old, new = edit
    head, loads, body = _unpack_ptx().partition("ld.global")
    for spelled in (old, str(int(old, 16)) if old.startswith("0x") else old):
        if spelled in body:
            broken = body.replace(spelled, str(int(new, 16)) if spelled.isdigit() else new, 1)
            break
    else:
        pytest.fail(f"there is no {old} in the kernel")
    planes = _every_byte()
    assert not np.array_equal(_unpacked(planes, head + loads + broken), _left_justified(planes))


# --- cache ------------------------------------------------------------------------------------------------------------


def test_bricks_follow_writes_to_the_weight() -> None:
    qweight = pack(_codes(40, 70, 8), 8)
    first = weights.bricks_of(qweight, 8, 70)
    assert weights.bricks_of(qweight, 8, 70) is first
    assert weights.bricks_of(qweight, 8, 70, paired=True) is not first
    qweight.copy_(pack(-_codes(40, 70, 8), 8))
    assert torch.equal(weights.bricks_of(qweight, 8, 70), weights.pack_bricks(qweight, 8, 70))
    assert weights.bricks_of(qweight, 8, 70) is not first


def test_bricks_die_with_their_weight() -> None:
    qweight = pack(_codes(20, 40, 6), 6)
    bricks = weakref.ref(weights.bricks_of(qweight, 6, 40))
    gc.collect()
    assert bricks() is not None
    del qweight
    gc.collect()
    assert bricks() is None


def test_weights_are_packed_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    qweight = pack(_codes(8, 64, 8), 8).as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match="before capturing"):
        weights.bricks_of(qweight, 8, 64)
