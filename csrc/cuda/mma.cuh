// Matrix instructions on bytes, and the loads that feed them.
#pragma once

#include <cstdint>

namespace ptq::cuda {

// Shared memory as the 32-bit addresses that assembly takes.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same value, of which the compiler does not know how it was made: it keeps the register instead of computing an
// address anew at every use.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
    asm("" : "+r"(value));
    return value;
}
template <typename T>
__device__ __forceinline__ const T* kept(const T* pointer) {
    asm("" : "+l"(pointer));
    return pointer;
}

// d[16 x 8] += a[16 x 32] b[32 x 8], signed bytes, exact in 32 bits (PTX ISA, mma.m16n8k32). Lane 4 g + t holds
//   a0: row g, k 4t..4t+3    a1: row g + 8    a2, a3: the same rows, k + 16
//   b0: column g, k 4t..4t+3    b1: k + 16
//   d0, d1: row g, columns 2t, 2t + 1    d2, d3: row g + 8
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 16 byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix, bytes
// 4t..4t+3 of row g: operand b of mma_s8 for rows of activations, k 0..15, 16..31, 32..47, 48..63.
template <int OFFSET>
__device__ __forceinline__ void load_matrices(uint32_t (&b)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address), "n"(OFFSET)
                 : "memory");
}

template <int OFFSET>
__device__ __forceinline__ void load_shared(uint32_t (&word)[4], uint32_t address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address), "n"(OFFSET)
                 : "memory");
}

}  // namespace ptq::cuda
