"""Weights in the order of the tensor core's registers: packed on first use, kept as long as their tensor.

N and K are padded to multiples of 128 with code 0. A strip of 32 channels belongs to one warp, which
reads it brick by brick, 64 k each: uint8 ``[N / 32, K / 64, chunks of 512 bytes]``. In a chunk every lane has 16 bytes.

A brick is four operands of ``mma.m16n8k32`` (channels times k), [2 * step + tile] for the steps of 32 k and the tiles
of 16 channels. Of an operand, lane 4 g + t holds four registers of four codes:

    register      0                  1                  2                  3
    row           g                  g + 8              g                  g + 8
    k             4t .. 4t + 3       4t .. 4t + 3       16 + 4t ..         16 + 4t ..

    row r of tile i is channel 4 (r % 8) + 2 i + r / 8 of the strip

so that a lane ends with the sums of four neighbouring channels, 4 g to 4 g + 3 (its rows g, g + 8 of both tiles).

8 bits: chunk j is operand j, 16 bytes of a lane its four registers. 6 bits: three chunks hold the planes a, b, c, whose
word j belongs to operand j. With w0 to w3 the codes at one byte of the four registers:

    bit     7 6 5 4 3 2   | 1 0
    a       w0            | w3 bits 5:4
    b       w1            | w3 bits 3:2
    c       w2            | w3 bits 1:0

Paired weights (``[w1; w3]`` of SwiGLU): channels alternate, w1's channel 0, w3's channel 0, w1's channel 1 ...
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...packing import pack, unpack
from ..weight_cache import WeightCache

STRIP = 32
BRICK_K = 64
ALIGN = 128  # N: all warps of a tile have a strip; K: bricks come in pairs

# Channels of a strip (g, tile, half of the rows) and k of a brick (step, half, t, byte), in memory: step, tile, lane
# (g, t), register (half of k, half of the rows), byte.
_SPLIT = (8, 2, 2), (2, 2, 4, 4)
_ORDER = (0, 4, 5, 2, 1, 7, 6, 3, 8)
_BACK = tuple(_ORDER.index(axis) for axis in range(len(_ORDER)))


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def packed_bytes(out_features: int, in_features: int, w_bits: int) -> int:
    """Bytes of the packed order of a weight ``[N, K]``."""
    return padded(out_features, ALIGN) * padded(in_features, ALIGN) * w_bits // 8


def pack_bricks(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """Stored weights uint8 ``[N, row bytes]`` in the order of the kernels, uint8 ``[N / 32, K / 64, bytes]``.

    Reads the weights, so that on a GPU it waits for them.

    Raises:
        ValueError: the bytes cannot have come from :func:`ptq4arvg_kernels.packing.pack`.
    """
    codes = unpack(qweight, w_bits, in_features)
    rows = codes.shape[0]
    if paired:
        codes = codes.view(2, rows // 2, in_features).transpose(0, 1).reshape(rows, in_features)
    codes = F.pad(codes, (0, padded(in_features, ALIGN) - in_features, 0, padded(rows, ALIGN) - rows))
    strips, bricks = codes.shape[0] // STRIP, codes.shape[1] // BRICK_K
    split = codes.view(strips, *_SPLIT[0], bricks, *_SPLIT[1])
    operands = split.permute(_ORDER).reshape(strips, bricks, 4, 32, 4, 4).view(torch.uint8)
    if w_bits == 8:
        return operands.reshape(strips, bricks, -1).contiguous()
    spare = operands[..., 3, :]
    planes = [(operands[..., i, :] << 2) | ((spare >> (4 - 2 * i)) & 3) for i in range(3)]
    # [strips, bricks, plane, lane, operand, byte]
    return torch.stack(planes, dim=2).transpose(3, 4).reshape(strips, bricks, -1).contiguous()


def unpack_bricks(bricks: Tensor, out_features: int, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """The inverse of :func:`pack_bricks`: stored weights uint8 ``[N, row bytes]``, bit for bit."""
    strips, count = bricks.shape[:2]
    if w_bits == 8:
        operands = bricks.view(torch.int8)
    else:
        a, b, c = bricks.view(strips, count, 3, 32, 4, 4).transpose(3, 4).unbind(2)
        spare = ((a & 3) << 6) | ((b & 3) << 4) | ((c & 3) << 2)
        operands = torch.stack([a & 0xFC, b & 0xFC, c & 0xFC, spare], dim=4).view(torch.int8) >> 2
    split = operands.reshape(strips, count, 2, 2, 8, 4, 2, 2, 4).permute(_BACK)
    codes = split.reshape(strips * STRIP, count * BRICK_K)[:out_features, :in_features]
    if paired:
        codes = codes.reshape(out_features // 2, 2, in_features).transpose(0, 1).reshape(out_features, in_features)
    return pack(codes.contiguous(), w_bits)


_CACHE = WeightCache()


def bricks_of(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """:func:`pack_bricks` of a weight tensor, from the cache if it has not been written to since.

    Raises:
        ValueError: as :func:`pack_bricks`.
        RuntimeError: the weights are not packed yet and the current stream is being captured: the copy would belong to
            the graph and hold nothing before its first replay.
    """

    def make() -> Tensor:
        if qweight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the weights of a layer are not packed yet, and packing them cannot be captured into a CUDA graph; run "
                "the model once before capturing it"
            )
        return pack_bricks(qweight, w_bits, in_features, paired)

    return _CACHE.get(qweight, (w_bits, in_features, paired), make)
