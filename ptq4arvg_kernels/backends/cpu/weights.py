"""Weights in the order the kernels read them (csrc/cpu/pack.h): packed on first use, kept as long as their tensor.

A checkpoint stores weights row by row. Reordering takes about as long as reading the file, so it happens once per
tensor; the panels go when the tensor goes, and are made again when it was written to.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import native


@dataclass
class _Packed:
    version: int
    address: int
    panels: Tensor


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
_LOCK = threading.Lock()
_CACHE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode keep no count of writes, and cannot be written to outside it.
    return -1 if tensor.is_inference() else tensor._version


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
    with _LOCK:
        entries: dict[tuple[int, int, bool], _Packed] = _CACHE.setdefault(qweight, {})
        key = (w_bits, in_features, paired)
        known = entries.get(key)
        if known is not None and known.version == _version(qweight) and known.address == qweight.data_ptr():
            return known.panels
        version, address = _version(qweight), qweight.data_ptr()
        panels = pack_panels(qweight, w_bits, in_features, paired)
        if panels is not None:
            entries[key] = _Packed(version, address, panels)
        return panels
