"""Weights in the order of the tensor core's registers: packed on first use, kept as long as their tensor.

N and K are padded to multiples of 128 with code 0: all warps of a tile have channels, bricks come in pairs. A strip of
32 channels belongs to one warp, which reads it brick by brick, 64 k each: uint8 ``[N / 32, K / 64, chunks of 512
bytes]``. In a chunk every lane has 16 bytes.

A brick is four operands of ``mma.m16n8k32`` (channels times k), [2 * step + tile] for the steps of 32 k and the tiles
of 16 channels. Of an operand, lane 4 g + t holds four registers of four codes:

    register      0                  1                  2                  3
    row           g                  g + 8              g                  g + 8
    k             4t .. 4t + 3       4t .. 4t + 3       16 + 4t ..         16 + 4t ..

    row r of tile i is channel 4 (r % 8) + 2 i + r / 8 of the strip

so that a lane ends with the sums of four neighbouring channels, 4 g to 4 g + 3 (its rows g, g + 8 of both tiles).

8 bits: chunk j is operand j, 16 bytes of a lane its four registers. 6 bits: three chunks are the planes a, b, c of
the four registers (:mod:`..gpu_weights`), word j of a lane for operand j.

Paired weights (``[w1; w3]`` of SwiGLU): channels alternate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu_weights import PackedOnce, codes_of, packed_bytes, padded_codes, planes, stored_weights

__all__ = ["BRICK_K", "STRIP", "bricks_of", "pack_bricks", "packed_bytes", "unpack_bricks"]

STRIP = 32
BRICK_K = 64

# Channels of a strip (g, tile, half of the rows) and k of a brick (step, half, t, byte), in memory: step, tile, lane
# (g, t), register (half of k, half of the rows), byte.
_SPLIT = (8, 2, 2), (2, 2, 4, 4)
_ORDER = (0, 4, 5, 2, 1, 7, 6, 3, 8)
_BACK = tuple(_ORDER.index(axis) for axis in range(len(_ORDER)))


def pack_bricks(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """Stored weights uint8 ``[N, row bytes]`` in the order of the kernels, uint8 ``[N / 32, K / 64, bytes]``.

    Reads the weights, so that on a GPU it waits for them.

    Raises:
        ValueError: the bytes cannot have come from :func:`ptq4arvg_kernels.packing.pack`.
    """
    codes = padded_codes(qweight, w_bits, in_features, paired)
    strips, bricks = codes.shape[0] // STRIP, codes.shape[1] // BRICK_K
    split = codes.view(strips, *_SPLIT[0], bricks, *_SPLIT[1])
    operands = split.permute(_ORDER).reshape(strips, bricks, 4, 32, 4, 4).view(torch.uint8)
    if w_bits == 8:
        return operands.reshape(strips, bricks, -1).contiguous()
    # [strips, bricks, plane, lane, operand, byte]
    stacked = torch.stack(planes(operands.unbind(-2)), dim=2)
    return stacked.transpose(3, 4).reshape(strips, bricks, -1).contiguous()


def unpack_bricks(bricks: Tensor, out_features: int, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """The inverse of :func:`pack_bricks`: stored weights uint8 ``[N, row bytes]``, bit for bit."""
    strips, count = bricks.shape[:2]
    if w_bits == 8:
        operands = bricks.view(torch.int8)
    else:
        operands = codes_of(bricks.view(strips, count, 3, 32, 4, 4).transpose(3, 4).unbind(2), dim=4)
    split = operands.reshape(strips, count, 2, 2, 8, 4, 2, 2, 4).permute(_BACK)
    codes = split.reshape(strips * STRIP, count * BRICK_K)
    return stored_weights(codes, out_features, w_bits, in_features, paired)


bricks_of = PackedOnce(pack_bricks)
