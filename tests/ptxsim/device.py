"""What stands in for a GPU under any backend: tensors as places in memory, records of launches, edited kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tests.ptxsim.counters import Result
from tests.ptxsim.launcher import Module, Pointer, load_ptx


def storage_offset(tensor: Tensor) -> int:
    """Bytes between the beginning of a tensor's storage and its first element."""
    return tensor.storage_offset() * tensor.element_size()


def extent(tensor: Tensor) -> int:
    """Bytes between a tensor's first element and the end of its last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def pointer_into(tensor: Tensor, offset: int = 0, name: str = "an operand") -> Pointer:
    """A pointer ``offset`` bytes behind a tensor's first element; from there to its last one it may be touched."""
    if tensor.device.type != "cpu":
        raise TypeError(f"{name} is on {tensor.device}: the emulator takes CPU tensors")
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return Pointer(storage.numpy(), storage_offset(tensor) + offset, extent(tensor) - offset)


class Record(Protocol):
    """One executed launch."""

    @property
    def name(self) -> str: ...

    @property
    def result(self) -> Result: ...


R = TypeVar("R", bound=Record)


class Device(Generic[R]):
    """Options, records and edited kernels of an emulated device.

    Args:
        hazards: "raise" an error for races, uninitialised or unwaited shared memory, "record" them, or "off".
        schedule: "lockstep", "warp_serial", "warp_reverse" or "random", see the README.
        transform: edits the PTX of every kernel before it is loaded; tests plant bugs with it. It gets the text and
            returns the text to run.
        record: keep a record of each launch in ``records``.
        options: further options of ``Module.launch`` (seed, batch, workers, max_steps, ctas, ...).
    """

    def __init__(
        self,
        *,
        hazards: str = "raise",
        schedule: str = "lockstep",
        transform: Callable[[str], str] | None = None,
        record: bool = True,
        **options: Any,
    ) -> None:
        self.transform = transform
        self.record = record
        self.options = {"hazards": hazards, "schedule": schedule, **options}
        self.records: list[R] = []
        self._edited: dict[str, Module] = {}

    def edited(self, ptx: str, pick: Callable[[str], str] = str) -> Module:
        """The loaded text that ``transform`` makes of ``ptx``; ``pick`` chooses what of it to load."""
        assert self.transform is not None
        text = pick(self.transform(ptx))
        if text not in self._edited:
            self._edited[text] = load_ptx(text)
        return self._edited[text]

    def results(self, kernel_name: str | None = None) -> list[Result]:
        """Results of the recorded launches, of one kernel or of all."""
        return [record.result for record in self.records if kernel_name in (None, record.name)]
