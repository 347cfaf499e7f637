"""Steps of attention over a filled cache, and what their results are measured by, for the backends on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.backends.heads import Grouping, Heads
from tests.kernels.kernel_cases import CacheCase, cache_case, generator, random_table


@dataclass
class Step:
    """A cache of codes and what a step brings: P new tokens at the end of ``end`` visible ones."""

    case: CacheCase
    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    positions: Tensor
    visible_end: Tensor
    out_table: Tensor

    @property
    def scale(self) -> float:
        return float(self.case.head_dim**-0.5)

    def layer(self) -> Heads:
        case, options = self.case, dict(self.case.options)
        grouping = Grouping.of_data(case.kv_group, case.k_table)
        sizes = (case.heads, case.head_dim, *case.tables(), self.scale, grouping, case.qk_kind)
        return Heads(*sizes, eps=options.pop("eps", 0.0), **options)

    def caches(self) -> tuple[Tensor, Tensor]:
        return self.k_cache.clone(), self.v_cache.clone()

    def reference(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, the codes that attention's output becomes, and the caches afterwards."""
        case, caches = self.case, self.caches()
        with kernels.use_backend("reference", strict=True):
            kind: Any = case.qk_kind
            tables = case.tables()
            q = kernels.qkv_append(self.qkv, *caches, self.positions, *tables, case.heads, kind, **case.options)
            mixed = kernels.attention(q, *caches, self.visible_end, case.slots, *tables, self.scale)
            codes, _ = kernels.quantize(mixed, self.out_table, self.positions)
        return q, codes, *caches


def step(
    head_dim: int,
    slots: int,
    kind: str = "layer_norm",
    dtype: torch.dtype = torch.float16,
    batch: int = 2,
    heads: int = 2,
    period: int = 1,
    groups: int = 2,
    end: int | None = None,
) -> Step:
    """A step whose cache is full of random codes."""
    case = cache_case(batch, heads, head_dim, slots, kind, seed=slots, groups=groups)
    gen = generator(head_dim)
    last = end or slots
    k_cache, v_cache = case.caches()
    for cache in (k_cache, v_cache):
        cache.copy_(torch.randint(-128, 128, cache.shape, generator=gen))
    positions = torch.arange(last - period, last)
    qkv = torch.randn(batch * period, 3 * heads * head_dim, generator=gen).to(dtype)
    table = random_table(slots, [8, 6], 5, step=0.02)
    return Step(case, qkv, k_cache, v_cache, positions, (positions + 1).to(torch.int32), table)


def same_step(given: Step, got: tuple[Tensor, ...]) -> None:
    """Codes, their sums and the caches of a fused step are the reference's."""
    _, want, k_cache, v_cache = given.reference()
    codes, sums, k_written, v_written = got
    wrong = (codes.int() - want.int()).abs()
    assert (wrong != 0).sum() <= 1e-4 * wrong.numel()
    assert torch.equal(sums, codes.sum(1, dtype=torch.int32))
    assert torch.equal(k_written, k_cache)
    assert torch.equal(v_written, v_cache)


def restored(cache: Tensor, table: Tensor, case: CacheCase) -> np.ndarray:
    """``(code - zq) * delta`` in float64 ``[B, H, S, d]``, straight from the definition."""
    rows = np.stack([table.double().numpy()[int(group)] for group in case.kv_group], axis=1)[:, : cache.shape[2]]
    codes = cache.double().numpy()[..., : case.head_dim]
    exact: np.ndarray = (codes - rows[..., 2:3]) * rows[..., 0:1]
    return exact


def attention64(
    q: Tensor, caches: tuple[Tensor, Tensor], case: CacheCase, ends: list[int], scale: float
) -> tuple[np.ndarray, Tensor]:
    """Attention in float64 ``[B P, H d]``, and the same in torch's float32, rounded to q's dtype.

    Args:
        q: ``[B, H, P, d]``.
        ends: what the queries see.
    """
    keys = restored(caches[0], case.k_table, case)
    values = restored(caches[1], case.v_table, case)
    hidden = np.arange(keys.shape[2])[None, :] >= np.array(ends)[:, None]
    logits = np.where(hidden, -np.inf, q.double().numpy() @ keys.swapaxes(-1, -2) * scale)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    out = shares / shares.sum(-1, keepdims=True) @ values
    rows = q.shape[0] * q.shape[2]
    single = (q.float() @ torch.from_numpy(keys).float().transpose(-1, -2)) * scale
    single = torch.softmax(single.masked_fill(torch.from_numpy(hidden), float("-inf")), dim=-1)
    baseline = (single @ torch.from_numpy(values).float()).transpose(1, 2).reshape(rows, -1).to(q.dtype)
    return out.transpose(0, 2, 1, 3).reshape(rows, -1), baseline
