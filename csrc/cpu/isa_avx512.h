// AVX-512 (F, BW, VL, DQ, VNNI): one register holds the 16 lanes.
#pragma once

#if defined(PTQ_EMULATE_AVX512)
#include "emulate/avx512.h"
#else
#include <immintrin.h>
#endif

#if defined(PTQ_ISA_AMX)
#define PTQ_NS amx
#else
#define PTQ_NS avx512vnni
#endif

namespace ptq::PTQ_NS {

struct F {
    __m512 v;
};
struct I {
    __m512i v;
};
struct Mask {
    __mmask16 m;
};

inline __mmask16 lanes(int64_t n) {
    return static_cast<__mmask16>((1u << n) - 1u);
}

// --- float -----------------------------------------------------------------------------------------------------------
inline F set1(float x) {
    return {_mm512_set1_ps(x)};
}
inline F load(const float* p) {
    return {_mm512_loadu_ps(p)};
}
inline F load_n(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(lanes(n), p)};
}  // rest 0
inline void store(float* p, F a) {
    _mm512_storeu_ps(p, a.v);
}
inline void store_n(float* p, F a, int64_t n) {
    _mm512_mask_storeu_ps(p, lanes(n), a.v);
}
inline F operator+(F a, F b) {
    return {_mm512_add_ps(a.v, b.v)};
}
inline F operator-(F a, F b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
inline F operator*(F a, F b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
inline F operator/(F a, F b) {
    return {_mm512_div_ps(a.v, b.v)};
}
inline F fma(F a, F b, F c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}  // a * b + c, one rounding
inline F min(F a, F b) {
    return {_mm512_min_ps(a.v, b.v)};
}  // b where a lane is NaN
inline F max(F a, F b) {
    return {_mm512_max_ps(a.v, b.v)};
}
inline F sqrt(F a) {
    return {_mm512_sqrt_ps(a.v)};
}
inline F abs(F a) {
    return {_mm512_abs_ps(a.v)};
}
inline F round_even(F a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Mask less(F a, F b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
inline Mask finite(F a) {
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    return {_mm512_cmpneq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(a.v), exponent), exponent)};
}
inline bool all(Mask a) {
    return a.m == 0xffff;
}
inline F select(Mask m, F yes, F no) {
    return {_mm512_mask_blend_ps(m.m, no.v, yes.v)};
}
inline F swap_pairs(F a) {
    return {_mm512_permute_ps(a.v, 0xb1)};
}  // lanes 1, 0, 3, 2, ...
// Sign of b put on |a|.
inline F copysign(F a, F b) {
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    return {
        _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(b.v), _mm512_castps_si512(a.v), 0xca))};
}

// --- int32 -----------------------------------------------------------------------------------------------------------
inline I set1i(int32_t x) {
    return {_mm512_set1_epi32(x)};
}
inline I loadi(const int32_t* p) {
    return {_mm512_loadu_si512(p)};
}
inline I loadi_n(const int32_t* p, int64_t n) {
    return {_mm512_maskz_loadu_epi32(lanes(n), p)};
}
inline void storei(int32_t* p, I a) {
    _mm512_storeu_si512(p, a.v);
}
inline I operator+(I a, I b) {
    return {_mm512_add_epi32(a.v, b.v)};
}
inline I operator-(I a, I b) {
    return {_mm512_sub_epi32(a.v, b.v)};
}
inline I operator*(I a, I b) {
    return {_mm512_mullo_epi32(a.v, b.v)};
}
inline I shift_left(I a, int n) {
    return {_mm512_slli_epi32(a.v, n)};
}
inline F to_float(I a) {
    return {_mm512_cvtepi32_ps(a.v)};
}  // round to nearest even
inline I to_int(F a) {
    return {_mm512_cvtps_epi32(a.v)};
}  // of lanes that hold integers
inline F as_float(I a) {
    return {_mm512_castsi512_ps(a.v)};
}
inline I as_int(F a) {
    return {_mm512_castps_si512(a.v)};
}
inline int32_t sum(I a) {
    return _mm512_reduce_add_epi32(a.v);
}

// --- int8 ------------------------------------------------------------------------------------------------------------
inline I load_i8(const int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I load_i8_n(const int8_t* p, int64_t n) {
    return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p))};
}
inline void store_i8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void store_i8_n(int8_t* p, I a, int64_t n) {
    _mm_mask_storeu_epi8(p, lanes(n), _mm512_cvtepi32_epi8(a.v));
}

// --- half precision --------------------------------------------------------------------------------------------------
inline F load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_f16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F load_bf16(const uint16_t* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
// Round to nearest even; a NaN becomes a quiet NaN.
inline void store_bf16(uint16_t* p, F a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

// Halves are folded 16 → 8 → 4 → 2 → 1: the same tree on every instruction set.
inline float sum(F a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
// Lane j is sum(a[j]): the same tree, of 16 vectors at once.
inline F sums(const F* a) {
    __m512 half[8], quarter[4], pair[2];
    for (int i = 0; i < 8; ++i) {  // a[i] and a[i + 4] for i < 4, then a[i + 4] and a[i + 8]
        const __m512 x = a[i < 4 ? i : i + 4].v, y = a[i < 4 ? i + 4 : i + 8].v;
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 x = half[i], y = half[i + 4];
        quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512d x = _mm512_castps_pd(quarter[2 * i]), y = _mm512_castps_pd(quarter[2 * i + 1]);
        pair[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    return {_mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd))};
}
inline float max_of(F a) {
    return _mm512_reduce_max_ps(a.v);
}

}  // namespace ptq::PTQ_NS
