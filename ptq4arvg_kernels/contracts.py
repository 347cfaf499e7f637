"""The metadata contract of every operator: dtypes, shapes, devices and options, for all backends alike.

Each function takes the operator's arguments in schema order, raises ``TypeError`` (dtype) or ``ValueError`` (anything
else) with a remedy, and returns the :class:`OpSpec` the registry selects with. It runs in the real and in the fake
implementation, so it must not read tensor data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_choice,
    check_dtype,
    check_rows_divisible,
    check_same_device,
    check_tensor,
)
from .packing import MAX_IN_FEATURES, WEIGHT_BITS, packed_row_bytes, padded_head_dim
from .registry import OpSpec

ACTIVATIONS = ("none", "silu", "gelu_erf", "gelu_tanh")
NORM_KINDS = ("layer", "rms")
QK_KINDS = ("none", "layer_norm", "l2", "rope")

_FLOAT32 = (torch.float32,)
_INT32 = (torch.int32,)
_INT8 = (torch.int8,)


def _check_table(op: str, name: str, table: Tensor) -> None:
    check_tensor(op, name, table, _FLOAT32, (None, 4), "[T, 4] (delta, recip, zq, bits)")


def _check_positions(op: str, positions: Tensor, rows: int) -> None:
    check_tensor(op, "positions", positions, INDEX_DTYPES, (None,), "[P]")
    check_rows_divisible(op, rows, positions.shape[0])


def _check_row_map(op: str, name: str, values: str, index: Tensor | None, source: Tensor | None, rows: int) -> None:
    """``values[R, D]`` is read at row ``index[i]``, or at row i when there is no index."""
    if source is None:
        if index is not None:
            raise ValueError(f"{op}: {name} was passed without {values}; pass both or neither")
        return
    if index is not None:
        check_tensor(op, name, index, _INT32, (rows,), "[M]")
    elif source.shape[0] != rows:
        raise ValueError(
            f"{op}: {values} has {source.shape[0]} rows for M = {rows} rows; pass {name} (int32 [M]) to say which row "
            "belongs to which"
        )


def quantize(x: Tensor, table: Tensor, positions: Tensor, activation: str) -> OpSpec:
    op = "quantize"
    check_tensor(op, "x", x, FLOAT_DTYPES, (None, None), "[M, K]")
    _check_table(op, "table", table)
    _check_positions(op, positions, x.shape[0])
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_same_device(op, "x", x=x, table=table, positions=positions)
    return OpSpec(x.device, x.dtype, x.shape[0], in_features=x.shape[1], kind=activation)


def adaln_quant(
    x: Tensor,
    norm_kind: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    mod_rows: Tensor | None,
    scale_offset: float,
    table: Tensor,
    positions: Tensor,
) -> OpSpec:
    op = "adaln_quant"
    check_tensor(op, "x", x, FLOAT_DTYPES, (None, None), "[M, D]")
    rows, width = x.shape
    check_choice(op, "norm_kind", norm_kind, NORM_KINDS)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number >= 0")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(op, name, vector, FLOAT_DTYPES, (width,), "[D]")
    if (mod_scale is None) != (mod_shift is None):
        missing = "mod_scale" if mod_scale is None else "mod_shift"
        raise ValueError(f"{op}: {missing} is missing; modulation needs both mod_scale and mod_shift")
    if mod_scale is not None and mod_shift is not None:
        check_tensor(op, "mod_scale", mod_scale, FLOAT_DTYPES, (None, width), "[R, D]")
        check_tensor(op, "mod_shift", mod_shift, FLOAT_DTYPES, (mod_scale.shape[0], width), "[R, D]")
        check_dtype(op, "mod_shift", mod_shift, (mod_scale.dtype,))
    _check_row_map(op, "mod_rows", "mod_scale", mod_rows, mod_scale, rows)
    _check_table(op, "table", table)
    _check_positions(op, positions, rows)
    check_same_device(
        op,
        "x",
        x=x,
        weight=weight,
        bias=bias,
        mod_scale=mod_scale,
        mod_shift=mod_shift,
        mod_rows=mod_rows,
        table=table,
        positions=positions,
    )
    return OpSpec(x.device, x.dtype, rows, in_features=width, kind=norm_kind)


def _linear_family(
    op: str,
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
) -> tuple[int, int]:
    """Check the arguments all linear operators share; returns (M, N)."""
    check_tensor(op, "codes", codes, _INT8, (None, None), "[M, K]")
    rows = codes.shape[0]
    if not 1 <= in_features <= MAX_IN_FEATURES:
        raise ValueError(f"{op}: in_features is {in_features}, supported are 1 to {MAX_IN_FEATURES}")
    if codes.shape[1] != in_features:
        raise ValueError(
            f"{op}: codes have K = {codes.shape[1]} columns but the weight has in_features = {in_features}; "
            "the input belongs to another layer"
        )
    if w_bits not in WEIGHT_BITS:
        raise ValueError(f"{op}: w_bits is {w_bits}, supported are 6 and 8")
    check_tensor(op, "row_sums", row_sums, _INT32, (rows,), "[M]")
    check_tensor(op, "qweight", qweight, (torch.uint8,), (None, None), "[N, bytes]")
    expected = packed_row_bytes(in_features, w_bits)
    if qweight.shape[1] != expected:
        raise ValueError(
            f"{op}: a row of qweight has {qweight.shape[1]} bytes, but in_features = {in_features} at {w_bits} bits "
            f"packs into {expected}; check in_features and w_bits against the checkpoint, or pack again"
        )
    width = qweight.shape[0]
    check_tensor(op, "w_scale", w_scale, _FLOAT32, (width,), "[N]")
    check_tensor(op, "col_sums", col_sums, _INT32, (width,), "[N]")
    if bias is not None:
        check_tensor(op, "bias", bias, _FLOAT32, (width,), "[N]")
    _check_table(op, "table", table)
    _check_positions(op, positions, rows)
    check_same_device(
        op,
        "codes",
        codes=codes,
        row_sums=row_sums,
        qweight=qweight,
        w_scale=w_scale,
        col_sums=col_sums,
        bias=bias,
        table=table,
        positions=positions,
    )
    return rows, width


def linear(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    activation: str,
    out_dtype: torch.dtype,
) -> OpSpec:
    op = "linear"
    rows, width = _linear_family(
        op, codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions
    )
    check_choice(op, "activation", activation, ACTIVATIONS)
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype is {out_dtype}, expected float32, float16 or bfloat16")
    return OpSpec(codes.device, out_dtype, rows, in_features, width, w_bits, kind=activation)


def linear_quant(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    activation: str,
    out_table: Tensor,
) -> OpSpec:
    op = "linear_quant"
    rows, width = _linear_family(
        op, codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions
    )
    check_choice(op, "activation", activation, ACTIVATIONS)
    _check_table(op, "out_table", out_table)
    check_same_device(op, "codes", codes=codes, out_table=out_table)
    return OpSpec(codes.device, torch.int8, rows, in_features, width, w_bits, kind=activation)


def linear_swiglu_quant(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    out_table: Tensor,
) -> OpSpec:
    op = "linear_swiglu_quant"
    rows, width = _linear_family(
        op, codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions
    )
    if width % 2 != 0:
        raise ValueError(f"{op}: the weight has N = {width} rows; [w1; w3] stacked must be an even number")
    _check_table(op, "out_table", out_table)
    check_same_device(op, "codes", codes=codes, out_table=out_table)
    return OpSpec(codes.device, torch.int8, rows, in_features, width, w_bits, kind="swiglu")


def linear_gate_residual(
    codes: Tensor,
    row_sums: Tensor,
    qweight: Tensor,
    w_bits: int,
    in_features: int,
    w_scale: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    gate: Tensor | None,
    gate_rows: Tensor | None,
    residual: Tensor,
) -> OpSpec:
    op = "linear_gate_residual"
    rows, width = _linear_family(
        op, codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions
    )
    check_tensor(op, "residual", residual, FLOAT_DTYPES, (rows, width), "[M, N]")
    if gate is not None:
        check_tensor(op, "gate", gate, FLOAT_DTYPES, (None, width), "[R, N]")
    _check_row_map(op, "gate_rows", "gate", gate_rows, gate, rows)
    check_same_device(op, "codes", codes=codes, gate=gate, gate_rows=gate_rows, residual=residual)
    kind = "residual" if gate is None else "gate_residual"
    return OpSpec(codes.device, residual.dtype, rows, in_features, width, w_bits, kind=kind)


def _check_caches(op: str, k_cache: Tensor, v_cache: Tensor, expected: tuple[int | None, ...]) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(op, name, cache, _INT8, expected, "[B, H, S, dp]")
        slots, lanes = cache.shape[2], cache.shape[3]
        if cache.stride(3) != 1 or (slots > 1 and cache.stride(2) != lanes):
            raise ValueError(
                f"{op}: {name} has strides {cache.stride()}; the [S, dp] block of a head must be dense (batch and head "
                "strides are free): allocate the cache as [..., S, dp] and slice only the leading dimensions"
            )
    check_tensor(op, "v_cache", v_cache, _INT8, tuple(k_cache.shape), "[B, H, S, dp], as k_cache")


def _check_kv_tables(op: str, k_table: Tensor, v_table: Tensor, kv_group: Tensor, heads: int) -> None:
    layout = "[G, H, 4] (delta, recip, zq, bits)"
    check_tensor(op, "k_table", k_table, _FLOAT32, (None, heads, 4), layout)
    check_tensor(op, "v_table", v_table, _FLOAT32, (k_table.shape[0], heads, 4), layout)
    check_tensor(op, "kv_group", kv_group, _INT32, (None,), "[T]")


# Which optional arguments each qk_kind may carry. The others must be None: ignoring one would give a wrong image.
_QK_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "layer_norm": ("q_weight", "q_bias", "k_weight", "k_bias"),
    "l2": ("q_scale",),
    "rope": ("rope",),
}
_QK_REQUIRED: dict[str, tuple[str, ...]] = {"none": (), "layer_norm": (), "l2": ("q_scale",), "rope": ("rope",)}


def qkv_append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    k_table: Tensor,
    v_table: Tensor,
    kv_group: Tensor,
    num_heads: int,
    qk_kind: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    q_scale: Tensor | None,
    rope: Tensor | None,
    eps: float,
) -> OpSpec:
    op = "qkv_append"
    check_tensor(op, "qkv", qkv, FLOAT_DTYPES, (None, None), "[M, 3*H*d]")
    if num_heads < 1 or qkv.shape[1] == 0 or qkv.shape[1] % (3 * num_heads) != 0:
        raise ValueError(
            f"{op}: qkv has {qkv.shape[1]} columns, not a positive multiple of 3 * num_heads = {3 * num_heads}; "
            "columns are [q | k | v], each [H, d]"
        )
    head_dim = qkv.shape[1] // (3 * num_heads)
    _check_caches(op, k_cache, v_cache, (None, num_heads, None, padded_head_dim(head_dim)))
    _check_positions(op, positions, qkv.shape[0])
    period = positions.shape[0]
    batch = qkv.shape[0] // period if period else k_cache.shape[0]
    if k_cache.shape[0] != batch:
        raise ValueError(
            f"{op}: the cache has batch size {k_cache.shape[0]}, but M = {qkv.shape[0]} rows at P = {period} positions "
            f"are {batch} sequences; slice the cache with [:{batch}]"
        )
    _check_kv_tables(op, k_table, v_table, kv_group, num_heads)
    check_choice(op, "qk_kind", qk_kind, QK_KINDS)
    optional = {
        "q_weight": q_weight,
        "q_bias": q_bias,
        "k_weight": k_weight,
        "k_bias": k_bias,
        "q_scale": q_scale,
        "rope": rope,
    }
    for name, value in optional.items():
        if value is not None and name not in _QK_ARGUMENTS[qk_kind]:
            raise ValueError(f"{op}: {name} has no meaning for qk_kind {qk_kind!r}; pass None or another qk_kind")
        if value is None and name in _QK_REQUIRED[qk_kind]:
            raise ValueError(f"{op}: qk_kind {qk_kind!r} needs {name}")
    for name in _QK_ARGUMENTS["layer_norm"]:
        vector = optional[name]
        if vector is not None:
            check_tensor(op, name, vector, FLOAT_DTYPES, (head_dim,), "[d]")
    if q_scale is not None:
        check_tensor(op, "q_scale", q_scale, FLOAT_DTYPES, (num_heads,), "[H]")
    if rope is not None:
        if head_dim % 2 != 0:
            raise ValueError(f"{op}: rope rotates pairs, but the head dimension is {head_dim}; it must be even")
        check_tensor(op, "rope", rope, FLOAT_DTYPES, (None, head_dim // 2, 2), "[T, d/2, 2] (cos, sin)")
    if qk_kind == "layer_norm" and not eps > 0:
        raise ValueError(f"{op}: eps is {eps}; qk_kind 'layer_norm' needs the model's eps > 0")
    check_same_device(
        op,
        "qkv",
        qkv=qkv,
        k_cache=k_cache,
        v_cache=v_cache,
        positions=positions,
        k_table=k_table,
        v_table=v_table,
        kv_group=kv_group,
        **optional,
    )
    return OpSpec(
        qkv.device,
        qkv.dtype,
        qkv.shape[0],
        kind=qk_kind,
        head_dim=head_dim,
        num_heads=num_heads,
        capacity=k_cache.shape[2],
    )


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    visible_end: Tensor,
    span: int,
    k_table: Tensor,
    v_table: Tensor,
    kv_group: Tensor,
    softmax_scale: float,
) -> OpSpec:
    op = "attention"
    check_tensor(op, "q", q, FLOAT_DTYPES, (None, None, None, None), "[B, H, P, d]")
    batch, heads, period, head_dim = q.shape
    _check_caches(op, k_cache, v_cache, (batch, heads, None, padded_head_dim(head_dim)))
    check_tensor(op, "visible_end", visible_end, _INT32, (period,), "[P]")
    slots = k_cache.shape[2]
    if not 0 < span <= slots:
        raise ValueError(
            f"{op}: span is {span}, expected 1 to S = {slots}; it is the number of slots to read, at least the largest "
            "visible_end"
        )
    _check_kv_tables(op, k_table, v_table, kv_group, heads)
    if span > kv_group.shape[0]:
        raise ValueError(
            f"{op}: span is {span} but kv_group names the group of {kv_group.shape[0]} slots only; "
            "pass a kv_group of the whole sequence"
        )
    check_same_device(
        op,
        "q",
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        visible_end=visible_end,
        k_table=k_table,
        v_table=v_table,
        kv_group=kv_group,
    )
    return OpSpec(q.device, q.dtype, batch * period, head_dim=head_dim, num_heads=heads, capacity=slots)
