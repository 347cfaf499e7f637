// Integer instructions.
#pragma once

#include "avx512_types.h"

namespace ptq {

#define PTQ_EACH for (int i = 0; i < 16; ++i)

inline __m512i _mm512_set1_epi32(int x) {
    __m512i r;
    PTQ_EACH r.v[i] = static_cast<uint32_t>(x);
    return r;
}
inline __m512i _mm512_set1_epi8(char x) {
    return _mm512_set1_epi32(static_cast<int>(0x01010101u * static_cast<uint8_t>(x)));
}
inline __m512i _mm512_setzero_si512() {
    return _mm512_set1_epi32(0);
}

#define PTQ_BINARY(name, operation)                \
    inline __m512i name(__m512i a, __m512i b) {    \
        PTQ_EACH a.v[i] = a.v[i] operation b.v[i]; \
        return a;                                  \
    }
PTQ_BINARY(_mm512_add_epi32, +)
PTQ_BINARY(_mm512_sub_epi32, -)
PTQ_BINARY(_mm512_mullo_epi32, *)
PTQ_BINARY(_mm512_and_si512, &)
#undef PTQ_BINARY

inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
    PTQ_EACH a.v[i] = n < 32 ? a.v[i] << n : 0;
    return a;
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
    PTQ_EACH a.v[i] = n < 32 ? a.v[i] >> n : 0;
    return a;
}
// Bit by bit, bit (4 a + 2 b + c) of `table`.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i r = _mm512_setzero_si512();
    for (int row = 0; row < 8; ++row) {
        if (!((table >> row) & 1)) continue;
        PTQ_EACH r.v[i] |=
            ((row & 4) ? a.v[i] : ~a.v[i]) & ((row & 2) ? b.v[i] : ~b.v[i]) & ((row & 1) ? c.v[i] : ~c.v[i]);
    }
    return r;
}

inline __mmask16 _mm512_cmpneq_epi32_mask(__m512i a, __m512i b) {
    unsigned r = 0;
    PTQ_EACH r |= static_cast<unsigned>(a.v[i] != b.v[i]) << i;
    return static_cast<__mmask16>(r);
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 m, __m512i no, __m512i yes) {
    PTQ_EACH no.v[i] = (m >> i) & 1 ? yes.v[i] : no.v[i];
    return no;
}
inline int _mm512_reduce_add_epi32(__m512i a) {
    uint32_t r = 0;
    PTQ_EACH r += a.v[i];
    return static_cast<int>(r);
}

// Four products of an unsigned byte of w and a signed byte of q, added to each lane without saturation. Not inlined:
// unrolled loops hold hundreds of them.
[[gnu::noinline]] inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i w, __m512i q) {
    uint8_t u[64];
    int8_t s[64];
    memcpy(u, w.v, 64);
    memcpy(s, q.v, 64);
    PTQ_EACH sum.v[i] += static_cast<uint32_t>(u[4 * i] * s[4 * i] + u[4 * i + 1] * s[4 * i + 1] +
                                               u[4 * i + 2] * s[4 * i + 2] + u[4 * i + 3] * s[4 * i + 3]);
    return sum;
}

// Widening keeps the value, narrowing the low bits.
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    __m512i r;
    PTQ_EACH r.v[i] = static_cast<uint32_t>(static_cast<int32_t>(a.v[i]));
    return r;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    __m512i r;
    PTQ_EACH r.v[i] = a.v[i];
    return r;
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
    __m128i r;
    PTQ_EACH r.v[i] = static_cast<int8_t>(a.v[i]);
    return r;
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    __m256i r;
    PTQ_EACH r.v[i] = static_cast<uint16_t>(a.v[i]);
    return r;
}

#undef PTQ_EACH

}  // namespace ptq
