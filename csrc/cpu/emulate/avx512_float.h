// Floating-point instructions, in the default rounding mode.
#pragma once

#include "avx512_types.h"

namespace ptq {

constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8;
constexpr int _CMP_UNORD_Q = 0x03, _CMP_LT_OQ = 0x11;

#define PTQ_EACH for (int i = 0; i < 16; ++i)

inline __m512 _mm512_set1_ps(float x) {
    __m512 r;
    PTQ_EACH r.v[i] = x;
    return r;
}

#define PTQ_BINARY(name, expression)         \
    inline __m512 name(__m512 a, __m512 b) { \
        PTQ_EACH a.v[i] = (expression);      \
        return a;                            \
    }
PTQ_BINARY(_mm512_add_ps, a.v[i] + b.v[i])
PTQ_BINARY(_mm512_sub_ps, a.v[i] - b.v[i])
PTQ_BINARY(_mm512_mul_ps, a.v[i] * b.v[i])
PTQ_BINARY(_mm512_div_ps, a.v[i] / b.v[i])
// The second operand where one is NaN or both are zeros.
PTQ_BINARY(_mm512_min_ps, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
PTQ_BINARY(_mm512_max_ps, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
#undef PTQ_BINARY

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    PTQ_EACH a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return a;
}
inline __m512 _mm512_sqrt_ps(__m512 a) {
    PTQ_EACH a.v[i] = __builtin_sqrtf(a.v[i]);
    return a;
}
inline __m512 _mm512_abs_ps(__m512 a) {
    PTQ_EACH a.v[i] = __builtin_fabsf(a.v[i]);
    return a;
}
inline __m512 _mm512_roundscale_ps(__m512 a, int /*to nearest even*/) {
    PTQ_EACH a.v[i] = __builtin_nearbyintf(a.v[i]);
    return a;
}

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    unsigned r = 0;
    PTQ_EACH {
        const bool holds = predicate == _CMP_LT_OQ ? a.v[i] < b.v[i] : __builtin_isunordered(a.v[i], b.v[i]);
        r |= static_cast<unsigned>(holds) << i;
    }
    return static_cast<__mmask16>(r);
}
inline __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 no, __m512 yes) {
    PTQ_EACH no.v[i] = (m >> i) & 1 ? yes.v[i] : no.v[i];
    return no;
}

// --- conversions
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    __m512 r;
    PTQ_EACH r.v[i] = static_cast<float>(static_cast<int32_t>(a.v[i]));
    return r;
}
// What an int32 cannot hold becomes 0x80000000.
inline __m512i _mm512_cvtps_epi32(__m512 a) {
    __m512i r;
    PTQ_EACH {
        const float x = __builtin_nearbyintf(a.v[i]);
        r.v[i] = x >= -0x1p31f && x < 0x1p31f ? static_cast<uint32_t>(static_cast<int32_t>(x)) : 0x80000000u;
    }
    return r;
}
inline float half_to_float(uint16_t h) {
    const int exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31 && fraction) {  // a quiet NaN with the same payload
        return bits_as<float>(static_cast<uint32_t>((h & 0x8000) << 16 | 0x7fc00000 | fraction << 13));
    }
    float magnitude = __builtin_inff();
    if (exponent < 31) {
        magnitude =
            __builtin_ldexpf(static_cast<float>(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
    }
    return h & 0x8000 ? -magnitude : magnitude;
}
// A half counts in steps of 2^(e - 10), where e >= -14 is the exponent; its bits are those of the count, and one more
// binade starts at every 1024 steps.
inline uint16_t float_to_half(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    if (x != x) return static_cast<uint16_t>(sign | 0x7e00 | ((bits >> 13) & 0x1ff));
    const int biased = static_cast<int>((bits >> 23) & 255), exponent = biased < 113 ? -14 : biased - 127;
    if (exponent > 15) return sign | 0x7c00;
    const int steps = static_cast<int>(__builtin_nearbyintf(__builtin_ldexpf(__builtin_fabsf(x), 10 - exponent)));
    return static_cast<uint16_t>(sign | (steps + (exponent + 14) * 1024));
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
    __m512 r;
    PTQ_EACH r.v[i] = half_to_float(a.v[i]);
    return r;
}
inline __m256i _mm512_cvtps_ph(__m512 a, int /*to nearest even*/) {
    __m256i r;
    PTQ_EACH r.v[i] = float_to_half(a.v[i]);
    return r;
}

// --- permutations; fields of two bits of `order` choose
inline int field(int order, int i) {
    return (order >> (2 * i)) & 3;
}
inline __m512 _mm512_permute_ps(__m512 a, int order) {
    __m512 r;
    PTQ_EACH r.v[i] = a.v[i / 4 * 4 + field(order, i % 4)];
    return r;
}
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
    __m512 r;
    PTQ_EACH r.v[i] = (i % 4 < 2 ? a : b).v[i / 4 * 4 + field(order, i % 4)];
    return r;
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
    __m512 r;
    PTQ_EACH r.v[i] = (i < 8 ? a : b).v[4 * field(order, i / 4) + i % 4];
    return r;
}
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
    __m512d r;
    for (int i = 0; i < 8; ++i) r.v[i] = (i % 2 ? b : a).v[i / 2 * 2];
    return r;
}
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
    __m512d r;
    for (int i = 0; i < 8; ++i) r.v[i] = (i % 2 ? b : a).v[i / 2 * 2 + 1];
    return r;
}
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
    __m256 r;
    for (int i = 0; i < 8; ++i) r.v[i] = a.v[8 * half + i];
    return r;
}
inline float _mm512_reduce_max_ps(__m512 a) {
    float r = a.v[0];
    PTQ_EACH r = a.v[i] > r ? a.v[i] : r;
    return r;
}

#undef PTQ_EACH

// --- narrow registers
inline __m256 _mm256_add_ps(__m256 a, __m256 b) {
    for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
    return a;
}
inline __m128 _mm256_extractf128_ps(__m256 a, int half) {
    return {{a.v[4 * half], a.v[4 * half + 1], a.v[4 * half + 2], a.v[4 * half + 3]}};
}
inline __m128 _mm_add_ps(__m128 a, __m128 b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
    return a;
}
inline __m128 _mm_add_ss(__m128 a, __m128 b) {
    a.v[0] += b.v[0];
    return a;
}
inline __m128 _mm_movehl_ps(__m128 a, __m128 b) {
    return {{b.v[2], b.v[3], a.v[2], a.v[3]}};
}
inline __m128 _mm_movehdup_ps(__m128 a) {
    return {{a.v[1], a.v[1], a.v[3], a.v[3]}};
}
inline float _mm_cvtss_f32(__m128 a) {
    return a.v[0];
}

}  // namespace ptq
