"""Unpacking of 6-bit weights in registers: three bytes hold four codes, and no byte ever crosses a lane.

Left-justified codes: the int8 value is ``4 w``, so that the sign comes for free; the products are divided by 4 after
the main loop (an exact shift, since every term is a multiple of 4). A byte column of the three planes a, b, c::

    bit     7 6 5 4 3 2 | 1 0
    a       w0          | w3 bits 5:4
    b       w1          | w3 bits 3:2
    c       w2          | w3 bits 1:0

Two paths with the same result: instructions on four bytes at once, nine for sixteen codes, and a plain twin. Triton
spreads byte arithmetic over one 32-bit lane per byte, which costs three to four times the instructions of the main
loop; its interpreter cannot execute assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Four bytes per register: $0 to $3 are the codes, $4 to $6 the planes. lop3 0xEA is (x & y) | z.
UNPACK = tl.constexpr("""
{
.reg .b32 s, t, u;
and.b32 $0, $4, 0xFCFCFCFC;
and.b32 $1, $5, 0xFCFCFCFC;
and.b32 $2, $6, 0xFCFCFCFC;
shl.b32 s, $6, 2;
shl.b32 t, $5, 4;
shl.b32 u, $4, 6;
and.b32 s, s, 0x0C0C0C0C;
lop3.b32 t, t, 0x30303030, s, 0xEA;
lop3.b32 $3, u, 0xC0C0C0C0, t, 0xEA;
}
""")


@triton.jit
def unpack(a, b, c, ASM: tl.constexpr):
    """Four int8 tensors ``4 w`` from three uint8 planes of the same shape; see the module's drawing.

    Args:
        a, b, c: uint8 tensors of one shape.
        ASM: constexpr, whether to use the inline-assembly path.
    """
    if ASM:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            UNPACK,
            "=&r,=&r,=&r,=&r,r,r,r",
            args=[a, b, c],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        w0 = (a & 0xFC).to(tl.int8, bitcast=True)
        w1 = (b & 0xFC).to(tl.int8, bitcast=True)
        w2 = (c & 0xFC).to(tl.int8, bitcast=True)
        w3 = ((a << 6) | ((b << 4) & 0x30) | ((c << 2) & 0x0C)).to(tl.int8, bitcast=True)
    return w0, w1, w2, w3
