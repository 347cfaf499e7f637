"""Weights in a backend's own order, kept as long as the stored tensor and made again when it was written to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Packed = TypeVar("Packed", Tensor, "Tensor | None")


@dataclass
class _Entry:
    version: int
    address: int
    packed: Any


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode keep no count of writes, and cannot be written to outside it.
    return -1 if tensor.is_inference() else tensor._version


class WeightCache:
    """Packed forms by stored tensor and key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, qweight: Tensor, key: Hashable, pack: Callable[[], Packed]) -> Packed:
        """What ``pack`` made of ``qweight`` under this key, if that was not written to since, else what it makes now.

        None is returned and not kept; an exception of ``pack`` goes through.
        """
        with self._lock:
            entries: dict[Hashable, _Entry] = self._entries.setdefault(qweight, {})
            version, address = _version(qweight), qweight.data_ptr()
            known = entries.get(key)
            if known is not None and (known.version, known.address) == (version, address):
                return known.packed
            packed = pack()
            if packed is not None:
                entries[key] = _Entry(version, address, packed)
            return packed
