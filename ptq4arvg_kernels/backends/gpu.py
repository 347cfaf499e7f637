"""What plans know of a GPU, for all backends that run on one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .override import Override


@dataclass(frozen=True)
class Device:
    """What the choice of tiles and schedules depends on.

    Attributes:
        capability: major * 10 + minor.
        multiprocessors: number of them.
        shared_bytes: shared memory a block may ask for.
        name: as torch names it; measured tiles belong to a name.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int
    name: str = ""


A100 = Device(80, 108, 166912, "NVIDIA A100")
# Bytes a block may opt in to (CUDA C++ programming guide, technical specifications per compute capability).
SHARED_BYTES: Mapping[int, int] = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
}

_assumed: Override[Device] = Override("assumed_gpu")


def assume(device: Device) -> contextlib.AbstractContextManager[None]:
    """Plan for CPU tensors as on ``device`` (instead of an A100) in this thread or task.

    For what looks at launches without a GPU; tensors on a GPU are not affected.
    """
    return _assumed.replace(device)


def describe(device: torch.device) -> Device:
    """The :class:`Device` behind a torch device. On CPU tensors, where launches are replaced, the one of :func:`assume`
    or an A100."""
    if device.type != "cuda":
        return _assumed.get() or A100
    return _describe_cuda(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _describe_cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES.get(capability, 101376))
    return Device(capability, int(properties.multi_processor_count), shared, properties.name)
