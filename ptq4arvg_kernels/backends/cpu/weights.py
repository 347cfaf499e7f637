"""Weights in the order the kernels read them (csrc/cpu/pack.h): packed on first use, kept as long as their tensor.

A checkpoint stores weights row by row. Reordering takes about as long as reading the file, so it happens once per
tensor; the panels go when the tensor goes, and are made again when it was written to.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..weight_cache import WeightCache
from . import native


class _Arena:
    """Pieces of large buffers on large pages, which weights are streamed from faster.

    A buffer goes with its last piece, except for the one that pieces are being cut from.
    """

    BYTES = 32 << 20
    ALIGN = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """uint8 ``[size]``, 64-byte aligned, uninitialized."""
        with self._lock:
            if self._used + size > len(self._buffer):
                self._buffer = torch.empty(max(size, self.BYTES) + self.ALIGN, dtype=torch.uint8)
                native.module().advise_large_pages(native.view(self._buffer))
                self._used = -self._buffer.data_ptr() % self.ALIGN
            piece = self._buffer[self._used : self._used + size]
            self._used += -(-size // self.ALIGN) * self.ALIGN
        return piece


_ARENA = _Arena()
_CACHE = WeightCache()


def pack_panels(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor | None:
    """Panels uint8 ``[bytes]`` of stored weights uint8 ``[N, row bytes]``; None if they hold a byte that no weight has.

    Args:
        paired: the rows are ``[w1; w3]``, whose halves are padded to whole panels separately.
    """
    module = native.module()
    size = module.packed_bytes(qweight.shape[0], in_features, w_bits, paired)
    panels = _ARENA.take(size)
    status = module.pack(native.view(qweight), native.view(panels), in_features, w_bits, paired, native.threads())
    return panels if status == native.OK else None


def unpack_panels(panels: Tensor, out_features: int, w_bits: int, in_features: int, paired: bool = False) -> Tensor:
    """The inverse of :func:`pack_panels`: stored weights uint8 ``[N, row bytes]``, bit for bit."""
    row_bytes = -(-in_features // 32) * 32 * w_bits // 8
    qweight = torch.empty(out_features, row_bytes, dtype=torch.uint8)
    native.module().unpack(native.view(panels), native.view(qweight), in_features, w_bits, paired, native.threads())
    return qweight


def panels_of(qweight: Tensor, w_bits: int, in_features: int, paired: bool = False) -> Tensor | None:
    """Panels of a weight tensor, from the cache if it has not been written to since; None if the bytes are corrupt."""
    key = (w_bits, in_features, paired)
    return _CACHE.get(qweight, key, lambda: pack_panels(qweight, w_bits, in_features, paired))
