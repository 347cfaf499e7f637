// Six-bit weights: three words hold four. Every byte of a, b, c is a code in its upper six bits, and two bits of the
// code that stands at the same byte of the fourth word (weights.py has the drawing):
//
//     bit   7 6 5 4 3 2 | 1 0
//     a     w0          | w3 bits 5:4
//     b     w1          | w3 bits 3:2
//     c     w2          | w3 bits 1:0
//
// Codes come out left-justified, 4 w: as signed bytes they need no sign extension, and every sum is a multiple of 4.
#pragma once

#include <cstdint>

namespace ptq::cuda {

constexpr uint32_t UPPER6 = 0xFCFCFCFCu;

// (x & UPPER6) | (y & ~UPPER6)
__device__ __forceinline__ uint32_t upper_of_lower_of(uint32_t x, uint32_t y) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(x), "r"(y), "n"(UPPER6));
    return d;
}

// Nine operations for sixteen weights. The shifts drag bits over byte borders into places that are masked afterwards.
__device__ __forceinline__ void unpack6(uint32_t a, uint32_t b, uint32_t c, uint32_t (&w)[4]) {
    w[0] = a & UPPER6;
    w[1] = b & UPPER6;
    w[2] = c & UPPER6;
    w[3] = (upper_of_lower_of(upper_of_lower_of(a << 2, b) << 2, c) << 2) & UPPER6;
}

}  // namespace ptq::cuda
