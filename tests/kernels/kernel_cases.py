"""Inputs and independent yardsticks for the kernel tests: numpy integers, float64, no code of the package under test
beyond table building and packing (which have tests of their own)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import erf
from torch import Tensor

from ptq4arvg_kernels.backends.cpu import native
from ptq4arvg_kernels.packing import column_sums, pack, padded_head_dim
from ptq4arvg_kernels.tables import make_kv_table, make_table

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def instruction_sets() -> list[str]:
    """Those the CPU backend can run on this machine, best first; none if it is not available."""
    if native.WHY_NOT is not None:
        return []
    return [name for name, compiled, supported in native.module().instruction_sets() if compiled and supported]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_table(length: int, bits: list[int], seed: int, step: float = 0.02) -> Tensor:
    """One group per position: random steps and zero points, ``bits`` repeated over the positions."""
    gen = generator(seed)
    widths = torch.tensor([bits[i % len(bits)] for i in range(length)])
    delta = step * (0.5 + torch.rand(length, generator=gen))
    zero = torch.tensor([int(torch.randint(0, 2 ** int(b), (1,), generator=gen)) for b in widths])
    return make_table(delta, zero, widths, torch.arange(length))


def unit_table(length: int, bits: list[int], zero: list[int]) -> Tensor:
    """delta = 1: the float results of a layer are then its corrected integers."""
    widths = torch.tensor([bits[i % len(bits)] for i in range(length)])
    points = torch.tensor([zero[i % len(zero)] for i in range(length)])
    return make_table(torch.ones(length), points, widths, torch.arange(length))


@dataclass
class LinearCase:
    """Operands of the linear family; ``operands`` is the leading argument list of its operators."""

    codes: Tensor
    weight: Tensor
    w_bits: int
    w_scale: Tensor
    bias: Tensor | None
    table: Tensor
    positions: Tensor
    operands: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = (
            self.codes,
            self.codes.sum(1, dtype=torch.int32),
            pack(self.weight, self.w_bits),
            self.w_bits,
            self.weight.shape[1],
            self.w_scale,
            column_sums(self.weight),
            self.bias,
            self.table,
            self.positions,
        )

    def row_table(self, table: Tensor) -> np.ndarray:
        """float64 [M, 4] rows of a table, expanded independently of the package."""
        period = len(self.positions)
        return np.stack([table[int(self.positions[i % period])].double().numpy() for i in range(len(self.codes))])

    def corrected(self) -> np.ndarray:
        """``acc - zq C`` in int64 [M, N]."""
        q, w = self.codes.numpy().astype(np.int64), self.weight.numpy().astype(np.int64)
        zq = self.row_table(self.table)[:, 2].astype(np.int64)
        return q @ w.T - zq[:, None] * w.sum(1)[None, :]

    def exact(self) -> np.ndarray:
        """``y`` in float64 [M, N]."""
        delta = self.row_table(self.table)[:, 0]
        y = delta[:, None] * self.w_scale.double().numpy()[None, :] * self.corrected()
        return y if self.bias is None else y + self.bias.double().numpy()

    def baseline(self) -> Tensor:
        """The same layer as a float32 torch computation on dequantized operands."""
        rows = torch.from_numpy(self.row_table(self.table)).float()
        x = (self.codes.float() - rows[:, 2:3]) * rows[:, 0:1]
        return torch.nn.functional.linear(x, self.weight.float() * self.w_scale[:, None], self.bias)


def linear_case(
    rows: int,
    out_features: int,
    in_features: int,
    w_bits: int,
    act_bits: list[int],
    seed: int = 0,
    period: int = 1,
    extreme: bool = False,
    bias: bool = True,
    unit: bool = False,
) -> LinearCase:
    """A random layer; ``extreme`` fills it with end codes only, ``unit`` sets all scales to 1."""
    gen = generator(seed)
    length = period + 3
    positions = torch.randperm(length, generator=gen)[:period]
    table = (
        unit_table(length, act_bits, [0, 63, 31, 17])
        if unit
        else random_table(length, act_bits, seed + 1, step=2.0 / math.sqrt(in_features))
    )
    widths = table[positions, 3].to(torch.int64).repeat(rows // period)
    half = (2 ** (widths - 1))[:, None]
    top = 2 ** (w_bits - 1) - 1
    if extreme:
        # Long runs of one sign make sums as large as they can get; a few flips catch lane mix-ups.
        flips = torch.rand(rows, in_features, generator=gen) < 0.02
        codes = torch.where(flips, half - 1, -half)
        weight = torch.where(torch.rand(out_features, in_features, generator=gen) < 0.02, -top, top)
    else:
        codes = (torch.rand(rows, in_features, generator=gen) * 2 * half).floor().to(torch.int64) - half
        weight = torch.randint(-top, top + 1, (out_features, in_features), generator=gen)
    scale = torch.ones(out_features) if unit else 0.01 * (0.5 + torch.rand(out_features, generator=gen))
    return LinearCase(
        codes.to(torch.int8),
        weight.to(torch.int8),
        w_bits,
        scale,
        torch.randn(out_features, generator=gen) if bias else None,
        table,
        positions,
    )


def activation64(values: np.ndarray, kind: str) -> np.ndarray:
    """Activations in float64 from their definitions."""
    if kind == "silu":
        return values / (1 + np.exp(-values))
    if kind == "gelu_erf":
        return 0.5 * values * (1 + erf(values / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * values * (1 + np.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))
    return values


def activation_torch(values: Tensor, kind: str) -> Tensor:
    functional = torch.nn.functional
    if kind == "silu":
        return functional.silu(values)
    if kind == "gelu_erf":
        return functional.gelu(values)
    if kind == "gelu_tanh":
        return functional.gelu(values, approximate="tanh")
    return values


def unrounded_codes(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """t of the law: float64 [M, K], before rounding and after clamping; ``rows`` [M, 4]."""
    half = 2.0 ** (rows[:, 3:4] - 1)
    return np.clip(values / rows[:, 0:1] + rows[:, 2:3], -half, half - 1)


def assert_codes(codes: Tensor, values: np.ndarray, rows: np.ndarray) -> None:
    """The quantizer law: |q - t| <= 0.5 + 1e-3."""
    assert codes.dtype == torch.int8
    distance = np.abs(codes.numpy().astype(np.float64) - unrounded_codes(values, rows))
    assert distance.max(initial=0.0) <= 0.5 + 1e-3, distance.max()


def assert_row_sums(codes: Tensor, row_sums: Tensor) -> None:
    assert row_sums.dtype == torch.int32
    assert row_sums.numpy().tolist() == codes.numpy().astype(np.int64).sum(1).tolist()


def assert_as_good_as(got: Tensor, exact: np.ndarray, baseline: Tensor) -> None:
    """|got - exact| <= 2 max|baseline - exact| + 1 ulp, the ulp of got's dtype at the exact value."""
    assert got.shape == exact.shape
    assert got.dtype == baseline.dtype
    allowed = 2 * np.abs(baseline.double().numpy() - exact).max()
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), 1e-300)))
    ulp = np.maximum(2.0**exponent * ULP[got.dtype], TINY[got.dtype])
    excess = np.abs(got.double().numpy() - exact) - ulp
    assert excess.max() <= allowed, (excess.max(), allowed)


@dataclass
class CacheCase:
    """An empty cache, its tables and the options of a qk kind."""

    batch: int
    heads: int
    head_dim: int
    slots: int
    k_table: Tensor
    v_table: Tensor
    kv_group: Tensor
    qk_kind: str
    options: dict[str, Any]

    def caches(self) -> tuple[Tensor, Tensor]:
        # 99 everywhere shows which bytes were written.
        shape = (self.batch, self.heads, self.slots, padded_head_dim(self.head_dim))
        return torch.full(shape, 99, dtype=torch.int8), torch.full(shape, 99, dtype=torch.int8)

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k_table, self.v_table, self.kv_group


def cache_case(
    batch: int, heads: int, head_dim: int, slots: int, qk_kind: str = "none", seed: int = 0, groups: int = 2
) -> CacheCase:
    gen = generator(seed)
    k_step = 0.01 if qk_kind == "l2" else 0.03

    def table(step: float) -> Tensor:
        delta = step * (0.5 + torch.rand(groups, heads, generator=gen))
        return make_kv_table(delta, torch.randint(64, 192, (groups, heads), generator=gen))

    k_table, v_table = table(k_step), table(0.03)
    kv_group = torch.clamp(torch.arange(slots), max=groups - 1).to(torch.int32)
    options: dict[str, Any] = {}
    if qk_kind == "layer_norm":
        for name in ("q_weight", "q_bias", "k_weight", "k_bias"):
            options[name] = torch.randn(head_dim, generator=gen)
        options["eps"] = 1e-6
    elif qk_kind == "l2":
        options["q_scale"] = 4 * torch.rand(heads, generator=gen)
    elif qk_kind == "rope":
        angle = 6 * torch.rand(slots, head_dim // 2, generator=gen)
        options["rope"] = torch.stack([angle.cos(), angle.sin()], dim=-1)
        options["rope"][0] = 0.0
    return CacheCase(batch, heads, head_dim, slots, k_table, v_table, kv_group, qk_kind, options)


def exact_heads(case: CacheCase, qkv: Tensor, positions: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What becomes of q and k, and v, in float64 ``[B, H, P, d]``."""
    x = qkv.double().numpy().reshape(case.batch, len(positions), 3, case.heads, case.head_dim)
    q, k, v = x.transpose(2, 0, 3, 1, 4)
    opts = {name: value.double().numpy() for name, value in case.options.items() if isinstance(value, Tensor)}
    if case.qk_kind == "layer_norm":

        def norm(y: np.ndarray, side: str) -> np.ndarray:
            y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + case.options["eps"])
            return y * opts[f"{side}_weight"] + opts[f"{side}_bias"]

        q, k = norm(q, "q"), norm(k, "k")
    elif case.qk_kind == "l2":
        q = q / np.linalg.norm(q, axis=-1, keepdims=True) * opts["q_scale"][:, None, None]
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    elif case.qk_kind == "rope":
        rotation = opts["rope"][positions][..., 0] + 1j * opts["rope"][positions][..., 1]

        def rotate(y: np.ndarray) -> np.ndarray:
            z = (y[..., 0::2] + 1j * y[..., 1::2]) * rotation
            return np.stack([z.real, z.imag], axis=-1).reshape(y.shape)

        q, k = rotate(q), rotate(k)
    return q, k, v
