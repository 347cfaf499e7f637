// Matrix instructions on half precision, and codes as their operands.
#pragma once

#include "mma.cuh"

namespace ptq::cuda {

// d[16 x 8] += a[16 x 16] b[16 x 8] of halves in float32 (PTX ISA, mma.m16n8k16). Lane 4 g + t holds, as pairs,
//   a0: row g, k 2t, 2t + 1    a1: row g + 8    a2, a3: the same rows, k + 8
//   b0: column g, k 2t, 2t + 1    b1: k + 8
//   d0, d1: row g, columns 2t, 2t + 1    d2, d3: row g + 8
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// COUNT (2 or 4) matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8. Of each, lane
// 4 g + t gets bytes 4t .. 4t + 3 of row g; TRANSPOSED: bytes 2g, 2g + 1 of rows 2t (low half) and 2t + 1.
template <int COUNT, bool TRANSPOSED>
__device__ __forceinline__ void load_bytes(uint32_t* word, uint32_t address) {
    if constexpr (COUNT == 4 && TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                     : "r"(address)
                     : "memory");
    } else if constexpr (COUNT == 4) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                     : "r"(address)
                     : "memory");
    } else if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(word[0]), "=r"(word[1])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(word[0]), "=r"(word[1])
                     : "r"(address)
                     : "memory");
    }
}

// 16 bytes from source + FROM to target + TO if `wanted`; otherwise zeros, and the source is not read (cp.async).
template <int TO, int FROM>
__device__ __forceinline__ void copy_slot16(uint32_t target, const void* source, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;" ::"r"(target), "l"(source),
                 "r"(wanted ? 16 : 0), "n"(TO), "n"(FROM)
                 : "memory");
}

// An 8 x 8 matrix of halves that lies over the lanes as d0, d1 do, transposed: it then lies as b0 does.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
    uint32_t turned;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
}

// --- codes as halves
//
// The half with the bits 0x6400 + u is 1024 + u, for every byte u. A code q is the byte q + 128 with its top bit
// flipped, so that masking and one exclusive or make 1152 + q of it; subtracting 1152 + zq leaves q - zq, exactly: an
// integer of at most 255.

constexpr uint32_t HALF_BYTES = 0x00FF00FFu, HALF_BASE = 0x64806480u;
constexpr float HALF_SHIFT = 1152.0f;

__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

// (word & HALF_BYTES) ^ HALF_BASE, in one instruction: the compiler makes two of constants it sees.
__device__ __forceinline__ uint32_t code_halves(uint32_t word) {
    uint32_t halves;
    asm("lop3.b32 %0, %1, %2, %3, %4;"
        : "=r"(halves)
        : "r"(word), "r"(HALF_BYTES), "r"(HALF_BASE), "n"((0xF0 & 0xCC) ^ 0xAA));
    return halves;
}

// Bytes 0 and 2 of a word, or 1 and 3, minus a pair of 1152 + zq.
__device__ __forceinline__ uint32_t even_codes(uint32_t word, uint32_t zero) {
    return subtract_halves(code_halves(word), zero);
}
__device__ __forceinline__ uint32_t odd_codes(uint32_t word, uint32_t zero) {
    return subtract_halves(code_halves(word >> 8), zero);
}

// Rounded to 11 bits: what a half holds, if it is not denormal.
__device__ __forceinline__ float eleven_bits(float x) {
    return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xFFFFE000u);
}

// 2^x, 2 units in the last place; 0 for what would be denormal.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace ptq::cuda
