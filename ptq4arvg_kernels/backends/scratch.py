"""Scratch memory of kernels whose thread blocks hand partial results to the last of them."""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
_LEAST = 1024


def counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 counters, all 0; a kernel leaves them 0.

    They are allocated once per stream, so that launches of one stream share them one after the other. A stream that is
    being captured into a graph and has none gets new ones per launch, cleared inside the graph: one memset more. To
    avoid that, run the model once on the stream that captures (``torch.cuda.graph(..., stream=s)``); graphs captured on
    one stream then share its counters and, like graphs that share a memory pool, must not be replayed at the same time.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    known = _COUNTERS.get((device, stream))
    if known is not None and len(known) >= count:
        return known
    # A captured allocation belongs to the graph: others would find it unwritten before the first replay.
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    fresh = torch.zeros(max(count, _LEAST), dtype=torch.int32, device=device)
    _COUNTERS[device, stream] = fresh
    return fresh
