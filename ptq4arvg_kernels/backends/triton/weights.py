"""Weights in the order the GEMM reads them: packed on first use, kept as long as their tensor.

K is padded to a multiple of 128 and N to one of 128, both with code 0. The bytes of one K tile of 128 lie together, so
that a tile of any number of channels is one run of bytes (8 bits) or three (6 bits): a warp copies whole lines, and one
address per thread reaches its part of the tile.

8 bits, int8 ``[K / 128, N, 128]``::

    K tile 0: channel 0: k = 0 ... 127 | channel 1: k = 0 ... 127 | ...
    K tile 1: channel 0: k = 128 ... 255 | ...

6 bits, uint8 ``[K / 128, 3, N, 32]``: three planes of 32 bytes per channel, which hold the four quarters of the K tile.
Byte i of the planes a, b, c (w the code at K tile + the given k)::

    bit     7 6 5 4 3 2   | 1 0
    a[i]    w(i)          | w(96 + i) bits 5:4
    b[i]    w(32 + i)     | w(96 + i) bits 3:2
    c[i]    w(64 + i)     | w(96 + i) bits 1:0

A quarter is contiguous in k: it is multiplied with a contiguous quarter of the activations, which keep their order.

Paired weights (``[w1; w3]`` of SwiGLU): channels alternate, w1's channel 0, w3's channel 0, w1's channel 1 ...
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...packing import pack, unpack
from ..weight_cache import WeightCache

K_TILE = 128
N_ALIGN = 128
QUARTER = K_TILE // 4


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def packed_bytes(out_features: int, in_features: int, w_bits: int) -> int:
    """Bytes of the packed order of a weight ``[N, K]``."""
    return padded(out_features, N_ALIGN) * padded(in_features, K_TILE) * w_bits // 8


def pack_tiles(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """Stored weights uint8 ``[N, row bytes]`` in the order of the kernels: int8 or uint8, see the module's drawing.

    Reads the weights, so that on a GPU it waits for them.

    Raises:
        ValueError: the bytes cannot have come from :func:`ptq4arvg_kernels.packing.pack`.
    """
    codes = unpack(qweight, w_bits, in_features)
    rows = codes.shape[0]
    if paired:
        codes = codes.view(2, rows // 2, in_features).transpose(0, 1).reshape(rows, in_features)
    codes = F.pad(codes, (0, padded(in_features, K_TILE) - in_features, 0, padded(rows, N_ALIGN) - rows))
    tiles = codes.view(codes.shape[0], -1, K_TILE).transpose(0, 1)
    if w_bits == 8:
        return tiles.contiguous()
    quarters = tiles.unflatten(-1, (4, QUARTER)).permute(2, 0, 1, 3).contiguous().view(torch.uint8)
    spare = quarters[3]
    planes = [(quarters[i] << 2) | ((spare >> (4 - 2 * i)) & 3) for i in range(3)]
    return torch.stack(planes, dim=1)


def unpack_tiles(tiles: Tensor, out_features: int, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """The inverse of :func:`pack_tiles`: stored weights uint8 ``[N, row bytes]``, bit for bit."""
    if w_bits == 8:
        codes = tiles.transpose(0, 1).flatten(1)
    else:
        a, b, c = tiles.unbind(1)
        spare = ((a & 3) << 6) | ((b & 3) << 4) | ((c & 3) << 2)
        left = torch.stack([a & 0xFC, b & 0xFC, c & 0xFC, spare], dim=2).view(torch.int8)
        codes = (left >> 2).transpose(0, 1).flatten(1)
    codes = codes[:out_features, :in_features]
    if paired:
        codes = codes.reshape(out_features // 2, 2, in_features).transpose(0, 1).reshape(out_features, in_features)
    return pack(codes.contiguous(), w_bits)


_CACHE = WeightCache()


def tiles_of(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """:func:`pack_tiles` of a weight tensor, from the cache if it has not been written to since.

    Raises:
        ValueError: as :func:`pack_tiles`.
        RuntimeError: the weights are not packed yet and the current stream is being captured: the copy would belong to
            the graph and hold nothing before its first replay.
    """

    def make() -> Tensor:
        if qweight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "weights are brought into the order of the Triton kernels at the first call of a layer, which cannot "
                "be part of a CUDA graph; run the model once before capturing it"
            )
        return pack_tiles(qweight, w_bits, in_features, paired)

    return _CACHE.get(qweight, (w_bits, in_features, paired), make)
