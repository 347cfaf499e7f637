"""Steps of generators of published sizes, recorded without a GPU: the production host code runs on CPU tensors of the
real shapes and hands its launches to a list instead of a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from ptq4arvg.blocks import QuantBlock, QuantHead, prepare
from ptq4arvg.nn import Condition, Window
from ptq4arvg_kernels.backends.gpu import Device

from .gpu_backends import gpu_backend
from .gpu_devices import ARCHITECTURES
from .random_models import random_quantized, size


@functools.lru_cache(maxsize=1)
def one_block(model: str, recipe: str, backend: str) -> tuple[Any, QuantBlock, QuantHead]:
    """A generator of a published width with one block of random weights, that block, and its head; of its own for every
    backend, which prepares it."""
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
        backend: whose launches are recorded.
    """

    model: str
    recipe: str
    sequences: int
    position: int
    length: int = 1
    dtype: torch.dtype = torch.float16
    backend: str = "triton"

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
        generator, block, head = one_block(self.model, self.recipe, self.backend)
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
        generator, _, _ = one_block(self.model, self.recipe, self.backend)
        with gpu_backend(self.backend).launching(ARCHITECTURES[80], lambda _: None):
            prepare(generator)

    def record(self, device: Device) -> dict[str, list[Any]]:
        """The launches of :meth:`calls` on ``device``."""
        [launches] = self.record_all([device])
        return launches

    def record_all(self, devices: Sequence[Device]) -> list[dict[str, list[Any]]]:
        """:meth:`record` for several devices; operands are made once."""
        self.prepare()
        calls = self.calls()
        backend = gpu_backend(self.backend)
        return [{name: backend.record(device, call) for name, call in calls.items()} for device in devices]
