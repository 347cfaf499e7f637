"""The INT8 key/value cache of one layer."""

from __future__ import annotations

import torch

from ptq4arvg_kernels.packing import padded_head_dim

__all__ = ["Int8KVCache"]


class Int8KVCache:
    """Codes of keys and values, int8 ``[B, H, S, dp]``.

    The slot of a token is its position; dp is the head width padded to 16 bytes.
    """

    def __init__(self, batch: int, heads: int, slots: int, head_dim: int, device: torch.device) -> None:
        shape = (batch, heads, slots, padded_head_dim(head_dim))
        self.k = torch.zeros(shape, dtype=torch.int8, device=device)
        self.v = torch.zeros(shape, dtype=torch.int8, device=device)
