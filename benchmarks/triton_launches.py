"""Launches of the Triton backend, recorded without a GPU: the production host code runs on CPU tensors of the real
shapes and hands its launches to a list instead of a device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from ptq4arvg.blocks import QuantBlock, QuantHead, prepare
from ptq4arvg.nn import Condition, Window
from ptq4arvg_kernels import use_backend
from ptq4arvg_kernels.backends.triton import launch, support, tiles
from ptq4arvg_kernels.backends.triton.launch import Launch, Launcher
from ptq4arvg_kernels.backends.triton.tiles import Device

from .random_models import random_quantized, size

GEMM = "gemm"


@contextlib.contextmanager
def assumed(device: Device) -> Iterator[None]:
    """Let the host code choose tiles and splits for ``device`` although its tensors are on the CPU."""
    with (
        mock.patch.object(tiles, "A100", device),
        mock.patch.object(support, "multiprocessors", return_value=device.multiprocessors),
    ):
        yield


@contextlib.contextmanager
def launching(device: Device, launcher: Launcher) -> Iterator[None]:
    """Run what is inside on the Triton backend, as on ``device``, with ``launcher`` in place of the GPU."""
    with assumed(device), launch.replace(launcher), use_backend("triton", strict=True), torch.no_grad():
        yield


def record(device: Device, call: Callable[[], Any]) -> list[Launch]:
    """The launches that ``call`` would start on ``device``; nothing is executed, so its results are garbage."""
    launches: list[Launch] = []
    with launching(device, launches.append):
        call()
    return launches


def kernel_name(started: Launch) -> str:
    """Name of the kernel's function, with the epilogue of a GEMM."""
    name = started.kernel.__name__
    return f"{name}/{started.constants['EPILOGUE']}" if name == GEMM else name


def is_gemm(started: Launch) -> bool:
    return bool(started.kernel.__name__ == GEMM)


def k_parts(started: Launch) -> int:
    """Parts of K that blocks of their own compute, of a GEMM."""
    return int(started.grid[1])


# Constants of a kernel that follow from others or from the width of its data.
_DERIVED = ("PADDED", "LANES", "CHUNK", "CHUNKS", "VECTOR")


def tile_name(started: Launch) -> str:
    """The tile, warps and stages of a GEMM; the sizes among the constants of another kernel, and its warps."""
    constants = started.constants
    if is_gemm(started):
        return f"{constants['BM']}x{constants['BN']}x{constants['BK']} w{started.num_warps} s{started.num_stages}"
    sizes = [f"{k}={v}" for k, v in constants.items() if type(v) is int and k not in _DERIVED]
    return f"{' '.join(sizes)} w{started.num_warps}"


def variant_name(started: Launch) -> str:
    """What else tells compiled kernels of one name and tile apart."""
    constants = started.constants
    if is_gemm(started):
        ragged = [name for name, even in (("M", "EVEN_M"), ("K", "EVEN_K")) if not constants[even]]
        parts = [f"w{constants['BITS']}", *([f"ragged {' '.join(ragged)}"] if ragged else [])]
        return " ".join([*parts, *(["split"] if k_parts(started) > 1 else [])])
    parts = [f"{v}" for v in constants.values() if isinstance(v, str)]
    parts += [k.lower() for k, v in constants.items() if v is True and k != "ASM"]
    absent = [k for k, v in started.arguments.items() if v is None]
    return " ".join([*parts, *([f"without {','.join(absent)}"] if absent else [])])


@functools.lru_cache(maxsize=1)
def one_block(model: str, recipe: str) -> tuple[Any, QuantBlock, QuantHead]:
    """A generator of a published width with one block of random weights, that block, and its head."""
    config = dataclasses.replace(size(model), depth=1)
    generator = random_quantized(config, recipe)
    block = next(module for module in generator.modules() if isinstance(module, QuantBlock))
    head = next(module for module in generator.modules() if isinstance(module, QuantHead))
    return generator, block, head


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a generator made by :func:`one_block`.

    Attributes:
        sequences: two per image with guidance.
        position: of the first token that is fed; a token sees its own slot and the earlier ones.
        length: positions that are fed at once; the rows M of the layers are ``sequences * length``.
        dtype: of the residual stream.
    """

    model: str
    recipe: str
    sequences: int
    position: int
    length: int = 1
    dtype: torch.dtype = torch.float16

    def window(self) -> Window:
        positions = torch.arange(self.position, self.position + self.length)
        return Window(positions, (positions + 1).to(torch.int32), self.position + self.length)

    def condition(self, width: int) -> Condition:
        """Every image of another class, and one unconditional vector for all: ``sequences / 2 + 1`` distinct conditions
        at every position."""
        images = max(1, self.sequences // 2)
        distinct = images + 1
        index = torch.arange(self.sequences).clamp(max=images)
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(distinct * self.length, width, generator=generator).to(self.dtype)
        rows = (index[:, None] * self.length + torch.arange(self.length)).flatten()
        return Condition(values, rows.to(torch.int32), self.window().positions.repeat(distinct))

    def calls(self) -> dict[str, Callable[[], Any]]:
        """What a decode step of one block and of the head calls, by name: ``modulation``, ``block``, ``head``.

        The modulation of many positions is computed at once while decoding, so it is apart from the block.
        """
        generator, block, head = one_block(self.model, self.recipe)
        width, adaln = generator.config.dim, block.adaln
        assert adaln is not None
        seed = torch.Generator().manual_seed(2)
        x = torch.randn(self.sequences, self.length, width, generator=seed).to(self.dtype)
        condition, window = self.condition(width), self.window()
        cache = block.new_cache(self.sequences, generator.sequence_length)
        modulation: list[torch.Tensor] = []

        def run_modulation() -> None:
            modulation[:] = [adaln(condition.values, condition.positions)]

        def run_block() -> Any:
            if not modulation:
                channels = 6 * width
                modulation[:] = [0.1 * torch.randn(len(condition.values), channels, generator=seed).to(self.dtype)]
            with mock.patch("ptq4arvg.blocks._modulation", return_value=modulation[0]):
                return block(x, condition, window, cache)

        def run_head() -> Any:
            return head(x, condition, window.positions)

        return {"modulation": run_modulation, "block": run_block, "head": run_head}

    def prepare(self) -> None:
        """Let the backend make its plans, if it has any: weights in its own order, blocks as one call."""
        generator, _, _ = one_block(self.model, self.recipe)
        with launching(tiles.A100, lambda _: None):
            prepare(generator)

    def record(self, device: Device) -> dict[str, list[Launch]]:
        """The launches of :meth:`calls` on ``device``."""
        [launches] = self.record_all([device])
        return launches

    def record_all(self, devices: Sequence[Device]) -> list[dict[str, list[Launch]]]:
        """:meth:`record` for several devices; operands are made once."""
        self.prepare()
        calls = self.calls()
        return [{name: record(device, call) for name, call in calls.items()} for device in devices]
