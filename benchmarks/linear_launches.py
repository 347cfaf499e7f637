"""Single products of linear layers as a backend launches them: codes in, fp16 out, no activation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.gpu import Device
from ptq4arvg_kernels.packing import column_sums, pack
from ptq4arvg_kernels.tables import make_table

from .gpu_backends import GpuBackend
from .rar_shapes import rar_shapes
from .shapes import LayerShape, adaln_layers, layer_shapes

# One shape that public kernels are compared at, and its numbers of rows.
SINGLE = LayerShape(4096, 1024, ("rar_l.fc1",))
SINGLE_ROWS = (16, 64, 200)
SHAPE_ROWS = (1, 2, 16, 64, 200, 512)
# Width and feed-forward width of the larger VAR models, whose width is 64 times their depth.
_VAR = {"var_d24": (1536, 6144, 4096), "var_d30": (1920, 7680, 4096)}


def all_shapes() -> list[LayerShape]:
    """The distinct layers of rar_b to rar_xxl, var_d16 to var_d30 and par_xl."""
    users: dict[tuple[int, int], list[str]] = {}
    for shape in [*rar_shapes(), *layer_shapes(("var_d16", "var_d20", "par_xl"))]:
        users.setdefault((shape.n, shape.k), []).extend(shape.users)
    for model, widths in _VAR.items():
        for layer, size in adaln_layers(*widths).items():
            users.setdefault(size, []).append(f"{model}.{layer}")
    return [LayerShape(n, k, tuple(names)) for (n, k), names in users.items()]


@functools.lru_cache(maxsize=1)
def _weights(n: int, k: int, w_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed random weights and their column sums."""
    top = 2 ** (w_bits - 1) - 1
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-top, top + 1, (n, k), generator=generator, dtype=torch.int8)
    return pack(codes, w_bits), column_sums(codes)


@dataclass(frozen=True)
class Linear:
    """A layer ``[n, k]`` on m rows; ``user`` names it."""

    user: str
    m: int
    n: int
    k: int
    recipe: str

    def record(self, backend: GpuBackend, device: Device) -> Any:
        """Its launch on ``device``."""
        w_bits, act_bits = int(self.recipe[1]), int(self.recipe[3])
        packed, sums = _weights(self.n, self.k, w_bits)
        generator = torch.Generator().manual_seed(1)
        codes = torch.randint(-128, 128, (self.m, self.k), generator=generator, dtype=torch.int8)
        row_sums = codes.sum(1, dtype=torch.int32)
        scale, bias = torch.full((self.n,), 1e-3), torch.zeros(self.n)
        table, positions = make_table(0.05, 2 ** (act_bits - 1), act_bits, [0]), torch.zeros(1, dtype=torch.int64)
        [started] = backend.record(
            device,
            lambda: kernels.linear(
                codes, row_sums, packed, w_bits, self.k, scale, sums, bias, table, positions, "none", torch.float16
            ),
        )
        return started


def linears(shapes: Sequence[LayerShape], recipes: Sequence[str], counts: Sequence[int]) -> Iterator[Linear]:
    """Every shape in every recipe with every number of rows."""
    for shape in shapes:
        for recipe in recipes:
            for m in counts:
                yield Linear(shape.users[0], m, shape.n, shape.k, recipe)
