"""Operators of the namespace ``ptq4arvg``: schemas, fake kernels, dispatch, and the typed Python wrappers.

Every operator is opaque to ``torch.compile``: the fake kernel checks metadata and allocates, the real one checks the
same metadata, makes the operands dense, and hands them to the backend the registry selects. Operators are for
inference; they have no backward.

Conventions shared by all of them: M rows laid out batch-major, so that row i sits at ``positions[i % P]`` and P divides
M; codes are int8 (6-bit codes too); floating operands are float32, float16 or bfloat16 and the arithmetic inside is
float32; a table is float32 ``[T, 4]`` as :mod:`ptq4arvg_kernels.tables` builds it. Wrong dtypes raise ``TypeError``,
other wrong metadata ``ValueError``; wrong data (a position outside the table, a NaN to be quantized) is found by the
backends that can read data cheaply, as documented there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from . import backends as _backends  # noqa: F401  (registers the built-in backends)
from . import contracts, registry
from .registry import OpSpec

Activation = Literal["none", "silu", "gelu_erf", "gelu_tanh"]
NormKind = Literal["layer", "rms"]
QkKind = Literal["none", "layer_norm", "l2", "rope"]

NAMESPACE = "ptq4arvg"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_LINEAR_OPERANDS = (
    "Tensor codes, Tensor row_sums, Tensor qweight, int w_bits, int in_features, Tensor w_scale, Tensor col_sums, "
    "Tensor? bias, Tensor table, Tensor positions"
)
_SCHEMAS = {
    "quantize": "(Tensor x, Tensor table, Tensor positions, str activation) -> (Tensor, Tensor)",
    "adaln_quant": "(Tensor x, str norm_kind, float eps, Tensor? weight, Tensor? bias, Tensor? mod_scale, "
    "Tensor? mod_shift, Tensor? mod_rows, float scale_offset, Tensor table, Tensor positions) -> (Tensor, Tensor)",
    "linear": f"({_LINEAR_OPERANDS}, str activation, ScalarType out_dtype) -> Tensor",
    "linear_quant": f"({_LINEAR_OPERANDS}, str activation, Tensor out_table) -> (Tensor, Tensor)",
    "linear_swiglu_quant": f"({_LINEAR_OPERANDS}, Tensor out_table) -> (Tensor, Tensor)",
    "linear_gate_residual": f"({_LINEAR_OPERANDS}, Tensor? gate, Tensor? gate_rows, Tensor residual) -> Tensor",
    "qkv_append": "(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor k_table, "
    "Tensor v_table, Tensor kv_group, int num_heads, str qk_kind, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, "
    "Tensor? k_bias, Tensor? q_scale, Tensor? rope, float eps) -> Tensor",
    # span grows with every decoded token: a SymInt keeps a compiled decode step from being specialised on it.
    "attention": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor visible_end, SymInt span, Tensor k_table, "
    "Tensor v_table, Tensor kv_group, float softmax_scale) -> Tensor",
}
OPERATORS: tuple[str, ...] = tuple(_SCHEMAS)

# Slices of one conditioning tensor: kept as strided views, so that nothing is copied per layer.
_ROW_VIEWS = frozenset({"mod_scale", "mod_shift", "gate"})
_CACHES = frozenset({"k_cache", "v_cache"})


def _dense(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or name in _CACHES:
        return value
    if name in _ROW_VIEWS and value.stride(-1) == 1:
        return value
    return value.contiguous()


def _codes_and_sums(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    return like.new_empty((rows, width), dtype=torch.int8), like.new_empty((rows,), dtype=torch.int32)


def _float_rows(like: Tensor, spec: OpSpec) -> Tensor:
    return like.new_empty((spec.rows, spec.out_features), dtype=spec.dtype)


def _fake_qkv_append(spec: OpSpec, qkv: Tensor, k_cache: Tensor, *rest: Any) -> Tensor:
    batch = k_cache.shape[0]
    period = rest[1].shape[0]
    return qkv.new_empty((batch, spec.num_heads, period, spec.head_dim))


# What each operator returns, given its OpSpec and arguments.
_RESULTS: dict[str, Callable[..., Any]] = {
    "quantize": lambda spec, x, *rest: _codes_and_sums(x, spec.rows, spec.in_features),
    "adaln_quant": lambda spec, x, *rest: _codes_and_sums(x, spec.rows, spec.in_features),
    "linear": lambda spec, codes, *rest: _float_rows(codes, spec),
    "linear_quant": lambda spec, codes, *rest: _codes_and_sums(codes, spec.rows, spec.out_features),
    "linear_swiglu_quant": lambda spec, codes, *rest: _codes_and_sums(codes, spec.rows, spec.out_features // 2),
    "linear_gate_residual": lambda spec, codes, *rest: _float_rows(codes, spec),
    "qkv_append": _fake_qkv_append,
    "attention": lambda spec, q, *rest: q.new_empty((spec.rows, spec.num_heads * spec.head_dim)),
}


def _define(op: str) -> None:
    contract: Callable[..., OpSpec] = getattr(contracts, op)
    allocate = _RESULTS[op]
    names = tuple(inspect.signature(contract).parameters)

    def real(*args: Any) -> Any:
        spec = contract(*args)
        implementation = registry.select(op, spec).implementations[op]
        return implementation(*map(_dense, names, args))

    def fake(*args: Any) -> Any:
        return allocate(contract(*args), *args)

    _LIBRARY.define(op + _SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_LIBRARY)


for _op in OPERATORS:
    _define(_op)


def quantize(x: Tensor, table: Tensor, positions: Tensor, activation: Activation = "none") -> tuple[Tensor, Tensor]:
    """Quantize rows with the static parameters of their positions: ``q = clamp(rne(act(x) * recip) + zq)``.

    Args:
        x: float ``[M, K]``.
        table: float32 ``[T, 4]``.
        positions: int32 or int64 ``[P]``.
        activation: applied in float32 before quantizing.

    Returns:
        codes int8 ``[M, K]`` and their row sums int32 ``[M]``. M = 0 is allowed.
    """
    return torch.ops.ptq4arvg.quantize(x, table, positions, activation)


def adaln_quant(
    x: Tensor,
    norm_kind: NormKind,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    mod_rows: Tensor | None,
    scale_offset: float,
    table: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Normalize, modulate and quantize: ``y = norm(x) * weight + bias; y = y * (scale_offset + scale[r]) + shift[r]``.

    Args:
        x: float ``[M, D]``.
        norm_kind: ``"layer"`` (mean and biased variance) or ``"rms"``; statistics in float32.
        eps: added to the variance or the mean square.
        weight, bias: float ``[D]`` or None, each on its own.
        mod_scale, mod_shift: float ``[R, D]`` of one dtype, both or neither; may be strided views (last stride 1).
        mod_rows: int32 ``[M]``, the modulation row r of every row; None means r = i, and then R must be M.
        scale_offset: 1.0 for ``x * (1 + scale) + shift``; 0.0 when the 1 was folded into ``mod_scale``.
        table, positions: as in :func:`quantize`.

    Returns:
        codes int8 ``[M, D]``, row sums int32 ``[M]``.
    """
    return torch.ops.ptq4arvg.adaln_quant(
        x, norm_kind, eps, weight, bias, mod_scale, mod_shift, mod_rows, scale_offset, table, positions
    )


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
    activation: Activation,
    out_dtype: torch.dtype,
) -> Tensor:
    """Integer linear layer: ``y = act((delta * s_j) * (acc - zq * C_j) + bias_j)``, the subtraction in int32.

    Args:
        codes, row_sums: int8 ``[M, K]`` and int32 ``[M]``, as a quantizing operator returned them.
        qweight: uint8 ``[N, bytes]`` from :func:`ptq4arvg_kernels.packing.pack`.
        w_bits, in_features: 6 or 8, and K.
        w_scale: float32 ``[N]``.
        col_sums: int32 ``[N]`` from :func:`ptq4arvg_kernels.packing.column_sums`.
        bias: float32 ``[N]`` or None.
        table, positions: those the codes were made with.
        activation: applied in float32.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[M, N]`` in ``out_dtype``.
    """
    return torch.ops.ptq4arvg.linear(
        codes,
        row_sums,
        qweight,
        w_bits,
        in_features,
        w_scale,
        col_sums,
        bias,
        table,
        positions,
        activation,
        out_dtype,
    )


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
    activation: Activation,
    out_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """:func:`linear` in float32, requantized with ``out_table`` at the same positions (fc1, GELU, fc2's input).

    Returns:
        codes int8 ``[M, N]``, row sums int32 ``[M]``.
    """
    return torch.ops.ptq4arvg.linear_quant(
        codes,
        row_sums,
        qweight,
        w_bits,
        in_features,
        w_scale,
        col_sums,
        bias,
        table,
        positions,
        activation,
        out_table,
    )


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
) -> tuple[Tensor, Tensor]:
    """``h = silu(y1) * y3``, requantized with ``out_table``; the weight rows are ``[w1; w3]`` stacked.

    Returns:
        codes int8 ``[M, N / 2]``, row sums int32 ``[M]``.
    """
    return torch.ops.ptq4arvg.linear_swiglu_quant(
        codes, row_sums, qweight, w_bits, in_features, w_scale, col_sums, bias, table, positions, out_table
    )


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
) -> Tensor:
    """``residual + gate[r] * y`` in float32, with y as in :func:`linear` without activation.

    Args:
        gate: float ``[R, N]`` (may be a strided view, last stride 1), or None for ``residual + y``.
        gate_rows: int32 ``[M]``, the row r; None means r = i, and then R must be M.
        residual: float ``[M, N]``; not modified.

    Returns:
        ``[M, N]`` in residual's dtype.
    """
    return torch.ops.ptq4arvg.linear_gate_residual(
        codes,
        row_sums,
        qweight,
        w_bits,
        in_features,
        w_scale,
        col_sums,
        bias,
        table,
        positions,
        gate,
        gate_rows,
        residual,
    )


def qkv_append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    k_table: Tensor,
    v_table: Tensor,
    kv_group: Tensor,
    num_heads: int,
    qk_kind: QkKind,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    q_scale: Tensor | None = None,
    rope: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Split qkv, normalize or rotate q and k, quantize k and v into their cache slots (slot = position); return q.

    Args:
        qkv: float ``[M, 3 H d]`` with M = B P; columns ``[q | k | v]``, each ``[H, d]``.
        k_cache, v_cache: int8 ``[B, H, S, dp]``, written in place; dp = d rounded up to 16, padding lanes set to 0.
            Batch and head strides are free, the ``[S, dp]`` block must be dense.
        positions: int32 or int64 ``[P]``, distinct, each < S and < T.
        k_table, v_table: float32 ``[G, H, 4]``, 8 bits.
        kv_group: int32 ``[T]``, group of every slot.
        num_heads: H.
        qk_kind: ``"none"``; ``"layer_norm"`` over d with the optional affine ``[d]`` vectors and ``eps``; ``"l2"``:
            ``q / max(|q|, 1e-12) * q_scale[h]`` and ``k / max(|k|, 1e-12)``; ``"rope"``: pairs (2j, 2j + 1) rotated by
            ``rope[pos, j] = (cos, sin)``, where rows of zeros give q = k = 0.
        q_weight, q_bias, k_weight, k_bias: float ``[d]``, only for ``"layer_norm"``.
        q_scale: float ``[H]``, required by ``"l2"``.
        rope: float ``[T, d/2, 2]``, required by ``"rope"``.
        eps: required (> 0) by ``"layer_norm"``, otherwise unused.

    Returns:
        q ``[B, H, P, d]`` in qkv's dtype.
    """
    return torch.ops.ptq4arvg.qkv_append(
        qkv,
        k_cache,
        v_cache,
        positions,
        k_table,
        v_table,
        kv_group,
        num_heads,
        qk_kind,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        q_scale,
        rope,
        eps,
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
) -> Tensor:
    """Attention over the INT8 cache: query i sees the slots ``j < visible_end[i]``.

    ``out = softmax(q . K^ * softmax_scale) . V^`` with ``K^ = (code - zq) * delta`` per (group of slot, head).

    Args:
        q: float ``[B, H, P, d]``.
        k_cache, v_cache: int8 ``[B, H, S, dp]``.
        visible_end: int32 ``[P]``, each 1 to ``span``.
        span: slots to read, ``max(visible_end) <= span <= S``; slots from ``span`` on are never touched.
        k_table, v_table, kv_group: as in :func:`qkv_append`.
        softmax_scale: usually d ** -0.5.

    Returns:
        ``[B P, H d]`` in q's dtype.
    """
    return torch.ops.ptq4arvg.attention(
        q, k_cache, v_cache, visible_end, span, k_table, v_table, kv_group, softmax_scale
    )
