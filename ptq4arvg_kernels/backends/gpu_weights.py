"""What the GPU backends' orders of weights have in common, see their ``weights`` modules.

Six bits: three planes hold four codes. Byte i of the planes a, b, c, with w0 to w3 the codes at that place::

    bit     7 6 5 4 3 2   | 1 0
    a[i]    w0[i]         | w3[i] bits 5:4
    b[i]    w1[i]         | w3[i] bits 3:2
    c[i]    w2[i]         | w3[i] bits 1:0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packing import pack, unpack
from .weight_cache import WeightCache

ALIGN = 128  # N and K are padded to multiples of it


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def packed_bytes(out_features: int, in_features: int, w_bits: int) -> int:
    """Bytes of the packed order of a weight ``[N, K]``."""
    return padded(out_features, ALIGN) * padded(in_features, ALIGN) * w_bits // 8


def padded_codes(qweight: Tensor, w_bits: int, in_features: int, paired: bool) -> Tensor:
    """Codes int8 of stored weights ``[N, row bytes]``, with zeros up to multiples of ALIGN channels and columns.

    paired: the channels of ``[w1; w3]`` (SwiGLU) alternate, w1's channel 0, w3's channel 0, w1's channel 1 ...

    Raises:
        ValueError: the bytes cannot have come from :func:`ptq4arvg_kernels.packing.pack`.
    """
    codes = unpack(qweight, w_bits, in_features)
    rows = codes.shape[0]
    if paired:
        codes = codes.view(2, rows // 2, in_features).transpose(0, 1).reshape(rows, in_features)
    return F.pad(codes, (0, padded(in_features, ALIGN) - in_features, 0, padded(rows, ALIGN) - rows))


def stored_weights(codes: Tensor, out_features: int, w_bits: int, in_features: int, paired: bool) -> Tensor:
    """The inverse of :func:`padded_codes`: uint8 ``[N, row bytes]``, bit for bit."""
    codes = codes[:out_features, :in_features]
    if paired:
        codes = codes.reshape(out_features // 2, 2, in_features).transpose(0, 1).reshape(out_features, in_features)
    return pack(codes.contiguous(), w_bits)


def planes(codes: Sequence[Tensor]) -> list[Tensor]:
    """The three planes, uint8, of four tensors of 6-bit codes (as uint8) of one shape."""
    spare = codes[3]
    return [(codes[i] << 2) | ((spare >> (4 - 2 * i)) & 3) for i in range(3)]


def codes_of(three: Sequence[Tensor], dim: int) -> Tensor:
    """The inverse of :func:`planes`: int8, the four tensors stacked along ``dim``."""
    a, b, c = three
    spare = ((a & 3) << 6) | ((b & 3) << 4) | ((c & 3) << 2)
    left = torch.stack([a & 0xFC, b & 0xFC, c & 0xFC, spare], dim=dim).view(torch.int8)
    return left >> 2


class PackedOnce:
    """The packed form of stored weights, made when it is first asked for and after every write to them."""

    def __init__(self, pack_weights: Callable[[Tensor, int, int, bool], Tensor]) -> None:
        self._pack, self.cache = pack_weights, WeightCache()

    def __call__(self, qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
        """``pack_weights(qweight, w_bits, in_features, paired)``, from the cache if nothing was written meanwhile.

        Raises:
            ValueError: as ``pack_weights``.
            RuntimeError: the weights are not packed yet and the current stream is being captured: the copy would belong
                to the graph and hold nothing before its first replay.
        """

        def make() -> Tensor:
            if qweight.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the weights of a layer are not packed yet, and packing them cannot be part of a CUDA graph; run "
                    "the model once before capturing it"
                )
            return self._pack(qweight, w_bits, in_features, paired)

        return self.cache.get(qweight, (w_bits, in_features, paired), make)
