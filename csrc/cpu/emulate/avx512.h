// The AVX-512 instructions that the kernels use, in plain C++ after Intel's description of each: the AVX-512 kernels
// then compile for and run on any x86-64. For tests: on machines without AVX-512, and under sanitizers, which see every
// byte that these functions touch but not what an instruction's mask or inline assembly reads. In place of
// <immintrin.h>, never beside it.
#pragma once

#include "avx512_float.h"
#include "avx512_int.h"
#include "avx512_types.h"

namespace ptq {

constexpr int _MM_HINT_T0 = 3, _MM_HINT_T1 = 2;
inline void _mm_prefetch(const char* p, int /*hint*/) {
    __builtin_prefetch(p);
}

template <typename Register>
inline Register load_register(const void* p) {
    Register r;
    memcpy(&r, p, sizeof r);
    return r;
}
// Lanes outside the mask are not touched in memory; loading makes them 0.
template <typename Register>
inline Register load_masked(__mmask16 m, const void* p) {
    Register r{};
    constexpr int size = sizeof(Register) / 16;
    for (int i = 0; i < 16; ++i) {
        if ((m >> i) & 1) memcpy(&r.v[i], static_cast<const char*>(p) + size * i, size);
    }
    return r;
}
template <typename Register>
inline void store_masked(void* p, __mmask16 m, const Register& a) {
    constexpr int size = sizeof(Register) / 16;
    for (int i = 0; i < 16; ++i) {
        if ((m >> i) & 1) memcpy(static_cast<char*>(p) + size * i, &a.v[i], size);
    }
}

inline __m512 _mm512_loadu_ps(const void* p) {
    return load_register<__m512>(p);
}
inline __m512i _mm512_loadu_si512(const void* p) {
    return load_register<__m512i>(p);
}
inline __m256i _mm256_loadu_si256(const void* p) {
    return load_register<__m256i>(p);
}
inline __m128i _mm_loadu_si128(const void* p) {
    return load_register<__m128i>(p);
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) {
    return load_masked<__m512>(m, p);
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 m, const void* p) {
    return load_masked<__m512i>(m, p);
}
inline __m128i _mm_maskz_loadu_epi8(__mmask16 m, const void* p) {
    return load_masked<__m128i>(m, p);
}
inline void _mm512_storeu_ps(void* p, __m512 a) {
    memcpy(p, &a, sizeof a);
}
inline void _mm512_storeu_si512(void* p, __m512i a) {
    memcpy(p, &a, sizeof a);
}
inline void _mm256_storeu_si256(void* p, __m256i a) {
    memcpy(p, &a, sizeof a);
}
inline void _mm_storeu_si128(void* p, __m128i a) {
    memcpy(p, &a, sizeof a);
}
// The hardware faults on an address that is not a multiple of 64.
inline void _mm512_store_si512(void* p, __m512i a) {
    if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
    memcpy(p, &a, sizeof a);
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 a) {
    store_masked(p, m, a);
}
inline void _mm_mask_storeu_epi8(void* p, __mmask16 m, __m128i a) {
    store_masked(p, m, a);
}

}  // namespace ptq
