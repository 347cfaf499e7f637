"""The INT8 key/value cache and attention over it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ptq4arvg_kernels as kernels
from ptq4arvg_kernels.packing import padded_head_dim
from tests.kernels.kernel_cases import (
    CacheCase,
    assert_as_good_as,
    cache_case,
    exact_heads,
    generator,
    unrounded_codes,
)

HEAD_DIMS = [48, 64, 80, 88, 96, 100, 128]
KINDS = ["none", "layer_norm", "l2", "rope"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _append(case: CacheCase, qkv: torch.Tensor, caches: tuple, positions: torch.Tensor) -> torch.Tensor:
    return kernels.qkv_append(qkv, *caches, positions, *case.tables(), case.heads, case.qk_kind, **case.options)


def _qkv(case: CacheCase, period: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(case.batch * period, 3 * case.heads * case.head_dim, generator=generator(seed)).to(dtype)


def _slot_rows(table: torch.Tensor, case: CacheCase, slots: list[int]) -> np.ndarray:
    """float64 [H, n, 4]"""
    return np.stack([table.double().numpy()[int(case.kv_group[s])] for s in slots], axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [48, 88, 100])
def test_append_against_float64(backend: str, dtype: torch.dtype, kind: str, head_dim: int) -> None:
    case = cache_case(2, 3, head_dim, 12, kind)
    positions = [0, 5, 1, 7]
    qkv = _qkv(case, 4, dtype=dtype)
    k_cache, v_cache = caches = case.caches()
    got = _append(case, qkv, caches, torch.tensor(positions, dtype=torch.int32))
    q, k, v = exact_heads(case, qkv, positions)
    baseline = torch.from_numpy(q).float().to(dtype)
    # q is rounded once to its dtype; its float32 computation may add as much as torch's own.
    assert got.shape == (2, 3, 4, head_dim)
    assert got.is_contiguous()
    assert (
        np.abs(got.double().numpy() - q).max()
        <= 2 * np.abs(baseline.double().numpy() - q).max() + 2e-6 * np.abs(q).max()
    )
    for cache, table, values in ((k_cache, case.k_table, k), (v_cache, case.v_table, v)):
        rows = np.broadcast_to(_slot_rows(table, case, positions), (2, 3, 4, 4)).reshape(-1, 4)
        t = unrounded_codes(values.reshape(-1, head_dim), rows).reshape(2, 3, 4, head_dim)
        written = cache[:, :, positions, :head_dim].double().numpy()
        assert np.abs(written - t).max() <= 0.5 + 1e-3
        assert (np.abs(t) > 20).mean() > 0.1  # the codes are spread over the grid, not all zero
        assert not cache[:, :, positions, head_dim:].any()
        untouched = [s for s in range(12) if s not in positions]
        assert (cache[:, :, untouched] == 99).all()


def test_rope_rows_of_zeros(backend: str) -> None:
    case = cache_case(1, 2, 64, 6, "rope")
    k_cache, _ = caches = case.caches()
    q = _append(case, _qkv(case, 2), caches, torch.tensor([0, 3]))
    assert not q[:, :, 0].any()
    assert q[:, :, 1].all()
    zero_code = case.k_table[0, :, 2].to(torch.int8)
    assert torch.equal(k_cache[0, :, 0, :64], zero_code[:, None].expand(2, 64))


def test_l2_of_a_zero_vector_is_zero(backend: str) -> None:
    case = cache_case(1, 2, 48, 4, "l2")
    caches = case.caches()
    q = _append(case, torch.zeros(1, 3 * 2 * 48), caches, torch.tensor([1]))
    assert not q.any()


def test_affine_is_optional(backend: str) -> None:
    case = cache_case(1, 2, 48, 4, "layer_norm")
    qkv, positions = _qkv(case, 2), torch.tensor([0, 1])
    unit = dict.fromkeys(("q_weight", "k_weight"), torch.ones(48)) | dict.fromkeys(
        ("q_bias", "k_bias"), torch.zeros(48)
    )
    plain, affine = case.caches(), case.caches()
    a = kernels.qkv_append(qkv, *plain, positions, *case.tables(), 2, "layer_norm", eps=1e-6)
    b = kernels.qkv_append(qkv, *affine, positions, *case.tables(), 2, "layer_norm", **unit, eps=1e-6)
    assert torch.equal(a, b)
    assert torch.equal(plain[0], affine[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_block_equals_token_by_token(backend: str, kind: str, head_dim: int) -> None:
    """The cache bytes are a law; the reference extends it to the attention output."""
    slots = 11
    case = cache_case(2, 2, head_dim, slots, kind)
    qkv = _qkv(case, slots)
    block, single = case.caches(), case.caches()
    q = _append(case, qkv, block, torch.arange(slots))
    ends = torch.arange(1, slots + 1, dtype=torch.int32)
    scale = head_dim**-0.5
    out = kernels.attention(q, *block, ends, slots, *case.tables(), scale).view(2, slots, -1)
    per_token = qkv.view(2, slots, -1)
    for t in range(slots):
        q_t = _append(case, per_token[:, t], single, torch.tensor([t]))
        assert torch.equal(q_t, q[:, :, t : t + 1])
        out_t = kernels.attention(q_t, *single, ends[t : t + 1], t + 1, *case.tables(), scale)
        if backend == "reference":
            assert torch.equal(out_t, out[:, t])
        else:
            torch.testing.assert_close(out_t, out[:, t], rtol=1e-4, atol=1e-5)
    assert torch.equal(block[0], single[0])
    assert torch.equal(block[1], single[1])
    for cache in block:
        assert cache.shape[3] == padded_head_dim(head_dim)
        assert not cache[..., head_dim:].any()


def _filled(case: CacheCase, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (case.batch, case.heads, case.slots, padded_head_dim(case.head_dim))
    caches = torch.randint(-128, 128, (2, *shape), generator=generator(seed)).to(torch.int8)
    return caches[0], caches[1]


def _attention64(case: CacheCase, q: torch.Tensor, caches: tuple, ends: list[int], scale: float) -> np.ndarray:
    """One query at a time, straight from the definition, float64 [B P, H d]."""
    slots = list(range(case.slots))
    restored = []
    for cache, table in zip(caches, (case.k_table, case.v_table), strict=True):
        rows = _slot_rows(table, case, slots)
        restored.append((cache.double().numpy()[..., : case.head_dim] - rows[..., 2:3]) * rows[..., 0:1])
    keys, values = restored
    out = np.zeros((case.batch, len(ends), case.heads, case.head_dim))
    for i, end in enumerate(ends):
        logits = np.einsum("bhd,bhsd->bhs", q[:, :, i].double().numpy(), keys[:, :, :end]) * scale
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, i] = np.einsum("bhs,bhsd->bhd", weights, values[:, :, :end])
    return out.reshape(case.batch * len(ends), -1)


def _attention_torch(case: CacheCase, q: torch.Tensor, caches: tuple, ends: torch.Tensor, scale: float) -> torch.Tensor:
    """The same-precision baseline: float32 dequantization and scaled_dot_product_attention, rounded to q's dtype."""
    restored = []
    for cache, table in zip(caches, (case.k_table, case.v_table), strict=True):
        rows = table[case.kv_group.long()].transpose(0, 1)
        restored.append((cache[..., : case.head_dim].float() - rows[..., 2:3]) * rows[..., 0:1])
    mask = torch.arange(case.slots)[None] < ends[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.float(), *restored, attn_mask=mask.expand(case.batch, case.heads, -1, -1), scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1).flatten(1).to(q.dtype)


# Causal decode, VAR's scales (1, 4, 9 tokens, each scale sees itself and its past), PAR's groups of 4 after 4 singles.
VISIBLE = {
    "decode": [14],
    "causal": list(range(1, 15)),
    "var": [1] + [5] * 4 + [14] * 9,
    "par": [1, 2, 3, 4] + [8] * 4 + [12] * 4 + [14] * 2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("visible", VISIBLE)
def test_attention_against_float64(backend: str, dtype: torch.dtype, head_dim: int, visible: str) -> None:
    case = cache_case(2, 3, head_dim, 14, groups=3)
    ends = torch.tensor(VISIBLE[visible], dtype=torch.int32)
    q = torch.randn(2, 3, len(ends), head_dim, generator=generator(4)).to(dtype)
    caches = _filled(case)
    scale = 1 / math.sqrt(head_dim)
    got = kernels.attention(q, *caches, ends, 14, *case.tables(), scale)
    exact = _attention64(case, q, caches, VISIBLE[visible], scale)
    assert_as_good_as(got, exact, _attention_torch(case, q, caches, ends, scale))


@pytest.mark.parametrize("visible", ["var", "par"])
def test_group_decode_equals_the_full_block(backend: str, visible: str) -> None:
    """VAR and PAR decode whole groups: every group is one call whose queries see the group's end."""
    case = cache_case(2, 2, 64, 14, "rope", groups=3)
    ends = VISIBLE[visible]
    qkv = _qkv(case, 14).view(2, 14, -1)
    full, grouped = case.caches(), case.caches()
    q = _append(case, qkv.flatten(0, 1), full, torch.arange(14))
    want = kernels.attention(q, *full, torch.tensor(ends, dtype=torch.int32), 14, *case.tables(), 0.125).view(2, 14, -1)
    start = 0
    for end in sorted(set(ends)):
        part = slice(start, end)
        q_part = _append(case, qkv[:, part].flatten(0, 1), grouped, torch.arange(start, end))
        reach = torch.full((end - start,), end, dtype=torch.int32)
        got = kernels.attention(q_part, *grouped, reach, end, *case.tables(), 0.125).view(2, end - start, -1)
        torch.testing.assert_close(got, want[:, part], rtol=1e-4, atol=1e-5)
        start = end
    assert torch.equal(full[0], grouped[0])
    assert torch.equal(full[1], grouped[1])


def test_hidden_and_unread_slots_do_not_matter(backend: str) -> None:
    case = cache_case(1, 2, 48, 12)
    q = torch.randn(1, 2, 2, 48, generator=generator(4))
    ends = torch.tensor([3, 5], dtype=torch.int32)
    k_cache, v_cache = _filled(case)
    want = kernels.attention(q, k_cache, v_cache, ends, 5, *case.tables(), 0.2)
    k_cache[:, :, 5:], v_cache[:, :, 5:] = 127, -128
    assert torch.equal(kernels.attention(q, k_cache, v_cache, ends, 5, *case.tables(), 0.2), want)
    wider = kernels.attention(q, k_cache, v_cache, ends, 12, *case.tables(), 0.2)
    torch.testing.assert_close(wider, want, rtol=1e-5, atol=1e-6)
    k_cache[:, :, :5, :48] += 1  # while the visible ones do matter
    assert not torch.equal(kernels.attention(q, k_cache, v_cache, ends, 5, *case.tables(), 0.2), want)


def test_padding_lanes_do_not_matter(backend: str) -> None:
    case = cache_case(1, 2, 88, 6)
    q = torch.randn(1, 2, 1, 88, generator=generator(4))
    k_cache, v_cache = _filled(case)
    ends = torch.tensor([6], dtype=torch.int32)
    k_cache[..., 88:], v_cache[..., 88:] = 0, 0
    out = kernels.attention(q, k_cache, v_cache, ends, 6, *case.tables(), 0.1)
    assert out.shape == (1, 2 * 88)
    exact = _attention64(case, q, (k_cache, v_cache), [6], 0.1)
    assert np.abs(out.double().numpy() - exact).max() < 1e-5


def test_zero_point_of_keys_cancels(backend: str) -> None:
    """One zero point for all slots adds a constant to every logit of a query; V's adds a constant to the output."""
    case = cache_case(2, 2, 64, 9, groups=1)
    q = torch.randn(2, 2, 4, 64, generator=generator(4))
    ends = torch.tensor([2, 5, 9, 9], dtype=torch.int32)
    caches = _filled(case)
    want = kernels.attention(q, *caches, ends, 9, *case.tables(), 0.125)
    moved = case.k_table.clone()
    moved[..., 2] += 17
    got = kernels.attention(q, *caches, ends, 9, moved, case.v_table, case.kv_group, 0.125)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    moved_v = case.v_table.clone()
    moved_v[..., 2] += 17
    shifted = kernels.attention(q, *caches, ends, 9, case.k_table, moved_v, case.kv_group, 0.125)
    constant = 17 * case.v_table[0, :, 0].repeat_interleave(64)
    torch.testing.assert_close(shifted, want - constant, rtol=1e-4, atol=1e-4)


def test_sink_groups_do_not_cancel(backend: str) -> None:
    """Sink slots with a zero point of their own: the cancellation must not be assumed."""
    case = cache_case(1, 1, 48, 6, groups=2)
    q = torch.randn(1, 1, 1, 48, generator=generator(4))
    ends = torch.tensor([6], dtype=torch.int32)
    caches = _filled(case)
    want = kernels.attention(q, *caches, ends, 6, *case.tables(), 0.125)
    moved = case.k_table.clone()
    moved[0, :, 2] += 40
    got = kernels.attention(q, *caches, ends, 6, moved, case.v_table, case.kv_group, 0.125)
    assert (got - want).abs().max() > 1e-3


def test_strided_caches_and_inputs(backend: str) -> None:
    """A slice of one big allocation [layers, 2, B, H, S, dp] is written in place; q and qkv may be strided."""
    case = cache_case(2, 2, 48, 6)
    store = torch.full((3, 2, 4, 2, 6, 48), 99, dtype=torch.int8)
    k_view, v_view = store[1, 0, :2], store[1, 1, :2]
    swapped = torch.full((2, 2, 6, 48), 99, dtype=torch.int8).transpose(0, 1)  # head-major memory
    wide = _qkv(case, 3).repeat_interleave(2, dim=1)[:, ::2]
    dense = case.caches()
    positions = torch.tensor([4, 0, 2])
    want = _append(case, wide.contiguous(), dense, positions)
    assert torch.equal(_append(case, wide, (k_view, v_view), positions), want)
    assert torch.equal(k_view, dense[0])
    assert torch.equal(v_view, dense[1])
    assert (store[0] == 99).all()
    assert (store[2] == 99).all()
    assert (store[1, :, 2:] == 99).all()
    assert torch.equal(_append(case, wide, (swapped, v_view), positions), want)
    assert torch.equal(swapped, dense[0])
    q = torch.randn(2, 3, 2, 48, generator=generator(4)).transpose(1, 2)
    ends = torch.tensor([6, 1, 3], dtype=torch.int32)
    a = kernels.attention(q, swapped, v_view, ends, 6, *case.tables(), 0.1)
    b = kernels.attention(q.contiguous(), *dense, ends, 6, *case.tables(), 0.1)
    assert torch.equal(a, b)


@pytest.mark.parametrize("column", [48, 96])
def test_reference_refuses_non_finite_keys_and_values(column: int) -> None:
    """And leaves the cache as it was."""
    case = cache_case(1, 1, 48, 4)
    qkv = _qkv(case, 1)
    qkv[0, column] = float("nan")
    caches = case.caches()
    with (
        kernels.use_backend("reference", strict=True),
        pytest.raises(ValueError, match="qkv_append: cannot quantize nan"),
    ):
        _append(case, qkv, caches, torch.tensor([1]))
    assert (caches[0] == 99).all()
    assert (caches[1] == 99).all()
