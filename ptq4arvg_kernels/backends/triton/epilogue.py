"""Epilogues of the integer GEMM: one mechanism, functions selected by constexpr, each with its formula.

Symbols as in the reference backend: i row (its position's delta_i, recip_i, zq_i, bits_i), j output channel, acc the
exact int32 product, s_j the weight scale, C_j the sum of the weight codes, b_j the bias. All arithmetic is float32 with
one rounding per operation, in the order written: kernels are compiled without fused multiply-adds (:mod:`.launch`).
Quantizing is :func:`.rounding.to_codes`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# log2(2 Phi(-a)) / a by powers of a, Phi the normal distribution: the coefficients of csrc/cpu/activation.h.
LOG_TAIL = tl.constexpr(
    (
        *(float.fromhex(c) for c in ("-0x1.26aedcp+0", "-0x1.d63a6ap-2", "-0x1.adf35ap-5", "0x1.cb72f6p-8")),
        *(float.fromhex(c) for c in ("-0x1.ad9c1ep-15", "-0x1.0c488cp-12", "0x1.252898p-14", "-0x1.4ca632p-17")),
        *(float.fromhex(c) for c in ("0x1.9c6f46p-21", "-0x1.b83280p-26")),
    )
)
LOG_TAIL_DEGREE = tl.constexpr(9)
TAIL_END = tl.constexpr(16.0)  # Phi(-16) is 0 in float32
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def dequantize(acc, delta, zq, scale, col_sums, bias):
    """``y_ij = (delta_i * s_j) * float(acc_ij - zq_i * C_j) + b_j``: the subtraction in int32, delta * s first.

    Args:
        acc: int32 ``[BM, BN]``.
        delta, zq: float32 and int32 ``[BM]``.
        scale, col_sums: float32 and int32 ``[BN]``.
        bias: float32 ``[BN]`` or None.
    """
    corrected = acc - zq[:, None] * col_sums[None, :]
    y = (delta[:, None] * scale[None, :]) * corrected.to(tl.float32)
    if bias is not None:
        y = y + bias[None, :]
    return y


@triton.jit
def gelu_erf(y):
    """``y Phi(y) = max(y, 0) - |y| Phi(-|y|)``, with ``Phi(-a) = 2^(a P(a) - 1)``: no cancellation, no branch, and half
    the instructions of an error function. Fused multiply-adds are this function's own; a NaN stays one."""
    a = tl.minimum(tl.abs(y), TAIL_END)
    p = tl.full(y.shape, LOG_TAIL[LOG_TAIL_DEGREE], tl.float32)
    for i in tl.static_range(LOG_TAIL_DEGREE):
        p = tl.fma(p, a, tl.full(y.shape, LOG_TAIL[LOG_TAIL_DEGREE - 1 - i], tl.float32))
    tail = tl.exp2(tl.fma(p, a, tl.full(y.shape, -1.0, tl.float32)))
    return tl.fma(-a, tail, tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """``none``, ``silu``, ``gelu_erf`` or ``gelu_tanh`` of float32 values of any shape.

    silu: ``y / (1 + exp(-y))``.  gelu_erf: ``y / 2 * (1 + erf(y / sqrt 2))``, see :func:`gelu_erf`.
    gelu_tanh: ``y / 2 * (1 + tanh u) = y / (1 + exp(-2 u))`` with ``u = sqrt(2 / pi) (y + 0.044715 y^3)``; the second
    form has no cancellation where tanh is close to -1.
    """
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu_erf":
        y = gelu_erf(y)
    elif ACTIVATION == "gelu_tanh":
        y = y / (1.0 + tl.exp((y + (y * y * y) * TANH_CUBIC) * -TANH_SCALE))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return y


@triton.jit
def swiglu(y, BM: tl.constexpr, BN: tl.constexpr):
    """``h_ij = silu(y1_ij) * y3_ij``: ``[BM, BN]`` to ``[BM, BN / 2]``.

    w1 and w3 are neighbouring columns of the packed order. An accumulator fragment is two columns wide, so a thread
    holds both and nothing has to move.
    """
    first, second = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
    return activate(first, "silu") * second


@triton.jit
def gated(y, gate):
    """``gate_rj * y_ij``, float32: the first half of ``out_ij = residual_ij + gate_rj * y_ij``."""
    return gate.to(tl.float32) * y


@triton.jit
def add_residual(y, residual):
    """``residual_ij + y_ij``, float32; the caller rounds it once to residual's dtype."""
    return residual.to(tl.float32) + y
