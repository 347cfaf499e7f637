"""The least bytes of the CUDA backend's launches, by the formulas of :mod:`.traffic_minimum`, from their parameters.

A GEMM that normalises its rows reads, in every column tile, the rows of the residual stream and their modulation
instead of codes, and the vectors of the norm once::

    packed W  +  ceil(N / BN) * (M * K * (x + scale + shift) + K * (weight + bias))  +  outputs
"""

from __future__ import annotations

from typing import Any

import torch

from ptq4arvg_kernels.backends.cuda.native import Launch
from ptq4arvg_kernels.backends.gpu_weights import padded

from .cuda_params import (
    DTYPE_BYTES,
    AdalnParams,
    AppendParams,
    AttentionParams,
    GemmParams,
    QuantizeParams,
    operand,
    params,
)
from .cuda_tiles import gemm_tile
from .traffic_minimum import TABLE_ROW, Minimum

K_ALIGN = 128  # csrc/cuda/gemm_params.h


def _size(p: Any, name: str, dtype: int) -> int:
    """Bytes of an element of an operand, 0 if it is absent."""
    return DTYPE_BYTES[dtype] if getattr(p, name) else 0


def _norm(p: GemmParams | AdalnParams) -> tuple[int, int, int]:
    """Bytes per column: of a row, of its modulation, of what all rows share."""
    n = p.norm
    modulation = _size(p, "norm_scale", n.mod_dtype) + _size(p, "norm_shift", n.mod_dtype)
    shared = _size(p, "norm_weight", n.weight_dtype) + _size(p, "norm_bias", n.bias_dtype)
    return DTYPE_BYTES[n.x_dtype], modulation, shared


def gemm(launch: Launch, p: GemmParams) -> Minimum:
    tile = gemm_tile(launch.name)
    assert tile is not None
    m, n, k = p.rows, p.channels, p.width
    weights = n * padded(k, K_ALIGN) * tile.bits // 8
    width = n // 2 if p.paired else n
    outputs = m * width * (1 if tile.output == "quant" else DTYPE_BYTES[p.out_dtype]) + (4 * m if p.sums else 0)
    residual, gate = _size(p, "residual", p.out_dtype), _size(p, "gate", p.gate_dtype)
    epilogue = m * n * (residual + gate)
    read = each = m * k
    if tile.norm:
        row, modulation, shared = _norm(p)
        each = k * (m * (row + modulation) + shared)
        conditions = min(m, p.norm.mod_count) if modulation else 0
        read = k * (m * row + conditions * modulation + shared)
    return Minimum(
        launch.grid[0] * weights + launch.grid[1] * each + outputs + epilogue,
        weights + read + outputs + m * n * residual + min(p.gate_count, m) * n * gate,
        epilogue,
    )


def _own(p: AdalnParams | QuantizeParams) -> int:
    """What every row reads and writes beside vectors: position, table row, its sum of codes."""
    return (8 if p.grids.wide else 4) + TABLE_ROW + (4 if p.sums else 0)


def quantize(launch: Launch, p: QuantizeParams) -> Minimum:
    total = launch.grid[0] * (p.width * (DTYPE_BYTES[p.x_dtype] + 1) + _own(p))
    return Minimum(total, total)


def adaln_quant(launch: Launch, p: AdalnParams) -> Minimum:
    rows, width = launch.grid[0], p.norm.width
    row, modulation, shared = _norm(p)
    own = width * (row + 1) + _own(p) + (4 if p.norm_mod_rows else 0)
    conditions = min(rows, p.norm.mod_count) if modulation else 0
    return Minimum(
        rows * (own + width * (shared + modulation)), rows * own + width * (shared + conditions * modulation)
    )


def _head_vectors(p: AppendParams | AttentionParams) -> int:
    names = ("q_weight", "q_bias", "k_weight", "k_bias", "rope")
    return sum(p.head_dim * _size(p, name, getattr(p, f"{name}_dtype")) for name in names)


def qkv_append(launch: Launch, p: AppendParams) -> Minimum:
    """A token and head: q, k, v read, q and two cached vectors written, two table rows."""
    own = 4 * p.head_dim * DTYPE_BYTES[p.dtype] + 2 * p.lanes + 2 * 8 + _size(p, "q_scale", p.q_scale_dtype)
    tokens = p.items // p.heads
    rows = tokens * ((8 if p.wide else 4) + 4)
    vectors = _head_vectors(p)
    return Minimum(p.items * (own + vectors) + rows, p.items * own + rows + vectors)


def attention(launch: Launch, p: AttentionParams) -> Minimum:
    """Per tile of queries, of a sequence and head: all slots that one of them sees, of K and V, once."""
    ends = operand(p.visible_end, launch.operands, torch.int32)
    item, tiles = DTYPE_BYTES[p.dtype], launch.grid[1]
    queries = 4 if launch.name.startswith("decode_") else 8 if launch.name.endswith("_d256") else 16
    slots = [int(ends[i * queries : (i + 1) * queries].max()) for i in range(tiles)]
    appended = 2 * p.lanes if p.append else 0
    cache = sum(2 * p.lanes * visible for visible in slots) - appended  # a new slot never comes from memory
    query = p.period * p.head_dim * item * (3 if p.append else 1)
    output = p.period * p.head_dim * (1 if p.out_table else item)
    tables = 2 * 8 * p.groups
    vectors = _head_vectors(p) if p.append else 0
    rest = query + output + appended + tables
    once = 2 * p.lanes * max(slots) - appended + rest
    return Minimum(p.pairs * (cache + rest + vectors), p.pairs * once + vectors)


def minimum(launch: Launch) -> Minimum:
    """The least bytes of a launch.

    Raises:
        ValueError: its kernel is not known.
    """
    p = params(launch)
    if isinstance(p, GemmParams):
        return gemm(launch, p)
    if isinstance(p, AdalnParams):
        return adaln_quant(launch, p)
    if isinstance(p, QuantizeParams):
        return quantize(launch, p)
    if isinstance(p, AppendParams):
        return qkv_append(launch, p)
    return attention(launch, p)
