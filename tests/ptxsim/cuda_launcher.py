"""Stands in for a GPU under the CUDA backend: runs the PTX of its kernels in the emulator.

    emulator = EmulatedDevice()
    with native.replace(emulator):
        ...                                          # production code on CPU tensors
    emulator.records[-1].result.metrics()

A launch brings the kernel's parameter as bytes, with addresses at its beginning. Each is looked up among the tensors of
the call (operands, outputs, workspaces, and the pieces that a workspace is cut into): the kernel may touch what lies
between it and the end of that tensor.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

from torch import Tensor

from ptq4arvg_kernels.backends.cuda.native import Launch
from tests.ptxsim.counters import Result
from tests.ptxsim.cuda_sources import kernel_module, only, source_ptx
from tests.ptxsim.device import Device, extent, pointer_into
from tests.ptxsim.errors import PTXError
from tests.ptxsim.launcher import Pointer, Struct


@dataclasses.dataclass(frozen=True)
class LaunchRecord:
    """One executed launch: how it was started, and the counters of the emulator."""

    launch: Launch
    result: Result

    @property
    def name(self) -> str:
        return self.launch.name


def locate(address: int, operands: Sequence[Tensor]) -> Pointer | None:
    """Where an address points: into the largest of the tensors that begin there, else into the smallest around it."""
    begins = [tensor for tensor in operands if tensor.data_ptr() == address and tensor.numel()]
    if begins:
        return pointer_into(max(begins, key=extent))
    around = [tensor for tensor in operands if tensor.data_ptr() < address < tensor.data_ptr() + extent(tensor)]
    if around:
        tensor = min(around, key=extent)
        return pointer_into(tensor, address - tensor.data_ptr())
    return None


def parameter(launch: Launch) -> Struct:
    """The launch's parameter, its addresses as places in the tensors of the call.

    Raises:
        PTXError: an address belongs to none of them.
    """
    places = {}
    for i, address in enumerate(struct.unpack_from(f"<{launch.pointers}Q", launch.params)):
        if address == 0:
            continue
        pointer = locate(address, launch.operands)
        if pointer is None:
            raise PTXError(f"{launch.name}: pointer {i} of its parameters lies in no tensor of the call")
        places[8 * i] = pointer
    return Struct(launch.params, places)


class EmulatedDevice(Device[LaunchRecord]):
    """A launcher for ``native.replace``: runs grids in the emulator, on CPU tensors in place.

    ``transform`` gets the PTX of the kernel's file; of what it returns, the kernel is run. See
    :class:`tests.ptxsim.device.Device`.
    """

    def __call__(self, launch: Launch) -> None:
        if self.transform is None:
            module = kernel_module(launch.name)
        else:
            module = self.edited(source_ptx(launch.name), lambda text: only(text, launch.name))
        result = module.launch(
            launch.name, launch.grid, launch.threads, [parameter(launch)], launch.shared, **self.options
        )
        if self.record:
            self.records.append(LaunchRecord(launch, result))
