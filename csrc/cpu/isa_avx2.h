// AVX2, FMA and F16C: two registers hold the 16 lanes.
#pragma once

#include <immintrin.h>

#define PTQ_NS avx2

namespace ptq::PTQ_NS {

struct F {
    __m256 lo, hi;
};
struct I {
    __m256i lo, hi;
};
struct Mask {
    __m256 lo, hi;
};

// Eight lanes, all ones below n.
inline __m256i lanes(int64_t n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index);
}

// --- float -----------------------------------------------------------------------------------------------------------
inline F set1(float x) {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline F load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline F load_n(const float* p, int64_t n) {  // rest 0
    return {_mm256_maskload_ps(p, lanes(n)), _mm256_maskload_ps(p + 8, lanes(n - 8))};
}
inline void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float* p, F a, int64_t n) {
    _mm256_maskstore_ps(p, lanes(n), a.lo);
    _mm256_maskstore_ps(p + 8, lanes(n - 8), a.hi);
}
inline F operator+(F a, F b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F operator-(F a, F b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F operator*(F a, F b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F operator/(F a, F b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F fma(F a, F b, F c) {  // a * b + c, one rounding
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F min(F a, F b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}  // b where a lane is NaN
inline F max(F a, F b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline F sqrt(F a) {
    return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)};
}
inline F abs(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F round_even(F a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline Mask less(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Mask finite(F a) {
    const __m256 limit = _mm256_set1_ps(__builtin_inff());
    return less(abs(a), {limit, limit});
}
inline bool all(Mask a) {
    return _mm256_movemask_ps(_mm256_and_ps(a.lo, a.hi)) == 0xff;
}
inline F select(Mask m, F yes, F no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
inline F swap_pairs(F a) {  // lanes 1, 0, 3, 2, ...
    return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
}
// Sign of b put on |a|.
inline F copysign(F a, F b) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(sign, a.lo), _mm256_and_ps(sign, b.lo)),
            _mm256_or_ps(_mm256_andnot_ps(sign, a.hi), _mm256_and_ps(sign, b.hi))};
}

// --- int32 -----------------------------------------------------------------------------------------------------------
inline I set1i(int32_t x) {
    return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline __m256i load8i(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store8i(int32_t* p, __m256i a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
inline I loadi(const int32_t* p) {
    return {load8i(p), load8i(p + 8)};
}
inline I loadi_n(const int32_t* p, int64_t n) {
    return {_mm256_maskload_epi32(p, lanes(n)), _mm256_maskload_epi32(p + 8, lanes(n - 8))};
}
inline void storei(int32_t* p, I a) {
    store8i(p, a.lo);
    store8i(p + 8, a.hi);
}
inline I operator+(I a, I b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I operator-(I a, I b) {
    return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline I operator*(I a, I b) {
    return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline I shift_left(I a, int n) {
    return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
inline F to_float(I a) {
    return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}  // round to nearest even
inline I to_int(F a) {
    return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}  // of lanes that hold integers
inline F as_float(I a) {
    return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
inline I as_int(F a) {
    return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
inline int32_t sum(I a) {
    const __m256i half = _mm256_add_epi32(a.lo, a.hi);
    __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    quarter = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
}

// --- int8 ------------------------------------------------------------------------------------------------------------
inline I widen_i8(__m128i bytes) {
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
inline I load_i8(const int8_t* p) {
    return widen_i8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I load_i8_n(const int8_t* p, int64_t n) {
    alignas(16) int8_t bytes[16] = {};
    for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
    return widen_i8(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}
inline __m128i narrow_i8(I a) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline void store_i8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_i8(a));
}
inline void store_i8_n(int8_t* p, I a, int64_t n) {
    alignas(16) int8_t bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes), narrow_i8(a));
    for (int64_t i = 0; i < n; ++i) p[i] = bytes[i];
}

// --- half precision --------------------------------------------------------------------------------------------------
inline __m128i load8h(const uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline void store8h(uint16_t* p, __m128i a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a);
}
inline F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load8h(p)), _mm256_cvtph_ps(load8h(p + 8))};
}
inline void store_f16(uint16_t* p, F a) {
    store8h(p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    store8h(p + 8, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F load_bf16(const uint16_t* p) {
    return {widen_bf16(load8h(p)), widen_bf16(load8h(p + 8))};
}
// Round to nearest even; a NaN becomes a quiet NaN.
inline __m256i narrow_bf16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
}
inline void store_bf16(uint16_t* p, F a) {
    const __m256i words = _mm256_packus_epi32(narrow_bf16(a.lo), narrow_bf16(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}

// Halves are folded 16 → 8 → 4 → 2 → 1: the same tree on every instruction set.
inline float sum(F a) {
    const __m256 half = _mm256_add_ps(a.lo, a.hi);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
// Lane j is sum(a[j]): the same tree, of 16 vectors at once.
inline __m256 sums4x2(const F* a, const F* b) {  // of a[0..3] and of b[0..3]
    __m256 quarter[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 x = _mm256_add_ps(a[i].lo, a[i].hi), y = _mm256_add_ps(b[i].lo, b[i].hi);
        quarter[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
    }
    __m256 pair[2];
    for (int i = 0; i < 2; ++i) {
        const __m256d x = _mm256_castps_pd(quarter[2 * i]), y = _mm256_castps_pd(quarter[2 * i + 1]);
        pair[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(pair[0], pair[1], 0x88), _mm256_shuffle_ps(pair[0], pair[1], 0xdd));
}
inline F sums(const F* a) {
    return {sums4x2(a, a + 4), sums4x2(a + 8, a + 12)};
}
inline float max_of(F a) {
    const __m256 half = _mm256_max_ps(a.lo, a.hi);
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

}  // namespace ptq::PTQ_NS
