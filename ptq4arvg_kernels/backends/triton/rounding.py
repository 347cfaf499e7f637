"""The quantizer of the laws, for kernels: ``q = clamp(rne(x * recip) + zq, -half, half - 1)``.

Adding 1.5 * 2^23 to a float32 of at most 2^22 rounds it to an integer, half to even, and leaves that integer in the low
bits of the sum. So a code costs a multiply, an add, two clamps and an integer add, and no conversion instruction. A
larger value is clamped all the same: rounding is monotonic. The product must be rounded on its own, which is why
kernels are compiled without fused multiply-adds (:mod:`.launch`). A NaN becomes the lowest code.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23
SHIFT_BITS = tl.constexpr(0x4B400000)  # the bits of SHIFT


@triton.jit
def to_codes(values, recip, zq, half):
    """int32 codes of float32 ``values``; ``recip``, ``zq`` and ``half`` = 2^(bits - 1) are float32 and broadcast."""
    shifted = values * recip + SHIFT
    shifted = tl.minimum(tl.maximum(shifted, SHIFT - half - zq), SHIFT + (half - 1.0) - zq)
    return shifted.to(tl.int32, bitcast=True) + (zq.to(tl.int32) - SHIFT_BITS)


@triton.jit
def half_range(bits):
    """``2^(bits - 1)`` of 6 or 8 bits, all as float32."""
    return tl.where(bits == 8.0, 128.0, 32.0)
