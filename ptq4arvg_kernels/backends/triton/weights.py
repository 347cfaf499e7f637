"""Weights in the order the GEMM reads them: packed on first use, kept as long as their tensor.

K is padded to a multiple of 128 and N to one of 128, both with code 0. The bytes of one K tile of 128 lie together, so
that a tile of any number of channels is one run of bytes (8 bits) or three (6 bits): a warp copies whole lines, and one
address per thread reaches its part of the tile.

8 bits, int8 ``[K / 128, N, 128]``::

    K tile 0: channel 0: k = 0 ... 127 | channel 1: k = 0 ... 127 | ...
    K tile 1: channel 0: k = 128 ... 255 | ...

6 bits, uint8 ``[K / 128, 3, N, 32]``: three planes of 32 bytes per channel (:mod:`..gpu_weights`), which hold the four
quarters of the K tile: k = 0 ... 31, 32 ... 63, 64 ... 95, and in their spare bits 96 ... 127.

A quarter is contiguous in k: it is multiplied with a contiguous quarter of the activations, which keep their order.

Paired weights (``[w1; w3]`` of SwiGLU): channels alternate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu_weights import ALIGN, PackedOnce, codes_of, packed_bytes, padded_codes, planes, stored_weights

__all__ = ["K_TILE", "N_ALIGN", "pack_tiles", "packed_bytes", "tiles_of", "unpack_tiles"]

K_TILE = N_ALIGN = ALIGN
QUARTER = K_TILE // 4


def pack_tiles(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """Stored weights uint8 ``[N, row bytes]`` in the order of the kernels: int8 or uint8, see the module's drawing.

    Reads the weights, so that on a GPU it waits for them.

    Raises:
        ValueError: the bytes cannot have come from :func:`ptq4arvg_kernels.packing.pack`.
    """
    codes = padded_codes(qweight, w_bits, in_features, paired)
    tiles = codes.view(codes.shape[0], -1, K_TILE).transpose(0, 1)
    if w_bits == 8:
        return tiles.contiguous()
    quarters = tiles.unflatten(-1, (4, QUARTER)).permute(2, 0, 1, 3).contiguous().view(torch.uint8)
    return torch.stack(planes(quarters.unbind()), dim=1)


def unpack_tiles(tiles: Tensor, out_features: int, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """The inverse of :func:`pack_tiles`: stored weights uint8 ``[N, row bytes]``, bit for bit."""
    if w_bits == 6:
        tiles = codes_of(tiles.unbind(1), dim=2)
    return stored_weights(tiles.transpose(0, 1).flatten(1), out_features, w_bits, in_features, paired)


tiles_of = PackedOnce(pack_tiles)
