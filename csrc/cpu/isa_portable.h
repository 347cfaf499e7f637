// No instruction set assumed: 16 lanes in arrays, loops the compiler may vectorise. Serves ARM and old x86.
#pragma once

#include <string.h>

#define PTQ_NS portable

namespace ptq::PTQ_NS {

struct F {
    float v[LANES];
};
struct I {
    int32_t v[LANES];
};
struct Mask {
    bool v[LANES];
};

#define PTQ_LANES for (int i = 0; i < LANES; ++i)

// --- float -----------------------------------------------------------------------------------------------------------
inline F set1(float x) {
    F r;
    PTQ_LANES r.v[i] = x;
    return r;
}
inline F load(const float* p) {
    F r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
inline F load_n(const float* p, int64_t n) {  // rest 0
    F r;
    PTQ_LANES r.v[i] = i < n ? p[i] : 0.0f;
    return r;
}
inline void store(float* p, F a) {
    memcpy(p, a.v, sizeof a.v);
}
inline void store_n(float* p, F a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = a.v[i];
}
#define PTQ_BINARY(type, name, expression) \
    inline type name(type a, type b) {     \
        type r;                            \
        PTQ_LANES r.v[i] = (expression);   \
        return r;                          \
    }
PTQ_BINARY(F, operator+, a.v[i] + b.v[i])
PTQ_BINARY(F, operator-, a.v[i] - b.v[i])
PTQ_BINARY(F, operator*, a.v[i] * b.v[i])
PTQ_BINARY(F, operator/, a.v[i] / b.v[i])
PTQ_BINARY(F, min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])  // b where a lane is NaN
PTQ_BINARY(F, max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
PTQ_BINARY(F, copysign, __builtin_copysignf(a.v[i], b.v[i]))  // sign of b put on |a|
PTQ_BINARY(I, operator+, a.v[i] + b.v[i])
PTQ_BINARY(I, operator-, a.v[i] - b.v[i])
PTQ_BINARY(I, operator*, a.v[i] * b.v[i])
#undef PTQ_BINARY
inline F fma(F a, F b, F c) {  // a * b + c, one rounding
    F r;
    PTQ_LANES r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return r;
}
inline F sqrt(F a) {
    F r;
    PTQ_LANES r.v[i] = __builtin_sqrtf(a.v[i]);
    return r;
}
inline F abs(F a) {
    F r;
    PTQ_LANES r.v[i] = __builtin_fabsf(a.v[i]);
    return r;
}
// Half to even without the rounding mode or a library call: adding 1.5 * 2^23 leaves no fraction bits; larger
// magnitudes are integers already.
inline F round_even(F a) {
    F r;
    PTQ_LANES {
        const volatile float shifted = __builtin_fabsf(a.v[i]) + 8388608.0f;
        const float rounded = shifted - 8388608.0f;
        r.v[i] = __builtin_fabsf(a.v[i]) < 8388608.0f ? __builtin_copysignf(rounded, a.v[i]) : a.v[i];
    }
    return r;
}
inline Mask less(F a, F b) {
    Mask r;
    PTQ_LANES r.v[i] = a.v[i] < b.v[i];
    return r;
}
inline Mask finite(F a) {
    Mask r;
    PTQ_LANES r.v[i] = __builtin_fabsf(a.v[i]) < __builtin_inff();
    return r;
}
inline bool all(Mask a) {
    bool r = true;
    PTQ_LANES r = r && a.v[i];
    return r;
}
inline F select(Mask m, F yes, F no) {
    F r;
    PTQ_LANES r.v[i] = m.v[i] ? yes.v[i] : no.v[i];
    return r;
}

inline F swap_pairs(F a) {  // lanes 1, 0, 3, 2, ...
    F r;
    PTQ_LANES r.v[i] = a.v[i ^ 1];
    return r;
}

// --- int32 -----------------------------------------------------------------------------------------------------------
inline I set1i(int32_t x) {
    I r;
    PTQ_LANES r.v[i] = x;
    return r;
}
inline I loadi(const int32_t* p) {
    I r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
inline I loadi_n(const int32_t* p, int64_t n) {
    I r;
    PTQ_LANES r.v[i] = i < n ? p[i] : 0;
    return r;
}
inline void storei(int32_t* p, I a) {
    memcpy(p, a.v, sizeof a.v);
}
inline I shift_left(I a, int n) {
    I r;
    PTQ_LANES r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n);
    return r;
}
inline F to_float(I a) {  // round to nearest even
    F r;
    PTQ_LANES r.v[i] = static_cast<float>(a.v[i]);
    return r;
}
inline I to_int(F a) {  // of lanes that hold integers
    I r;
    PTQ_LANES r.v[i] = static_cast<int32_t>(a.v[i]);
    return r;
}
inline F as_float(I a) {
    F r;
    memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline I as_int(F a) {
    I r;
    memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline int32_t sum(I a) {
    int32_t r = 0;
    PTQ_LANES r += a.v[i];
    return r;
}

// --- int8 ------------------------------------------------------------------------------------------------------------
inline I load_i8(const int8_t* p) {
    I r;
    PTQ_LANES r.v[i] = p[i];
    return r;
}
inline I load_i8_n(const int8_t* p, int64_t n) {
    I r;
    PTQ_LANES r.v[i] = i < n ? p[i] : 0;
    return r;
}
inline void store_i8_n(int8_t* p, I a, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline void store_i8(int8_t* p, I a) {
    store_i8_n(p, a, LANES);
}

// --- half precision --------------------------------------------------------------------------------------------------
inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float f16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | (fraction ? 0x400000 | (fraction << 13) : 0));
    if (exponent) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
    return __builtin_copysignf(static_cast<float>(fraction) * 0x1p-24f, float_of(sign));  // subnormal: exact
}
// Round to nearest even, as the hardware does: normal results by integer arithmetic, subnormal ones by an addition
// whose last bit is worth 2^-24.
inline uint16_t float_to_f16(float x) {
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x1ff));
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {                                              // below 2^-14
        const volatile float shifted = float_of(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(shifted) & 0x7ff));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}
inline F load_f16(const uint16_t* p) {
    F r;
    PTQ_LANES r.v[i] = f16_to_float(p[i]);
    return r;
}
inline void store_f16(uint16_t* p, F a) {
    PTQ_LANES p[i] = float_to_f16(a.v[i]);
}
inline F load_bf16(const uint16_t* p) {
    F r;
    PTQ_LANES r.v[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
    return r;
}
// Round to nearest even; a NaN becomes a quiet NaN.
inline void store_bf16(uint16_t* p, F a) {
    PTQ_LANES {
        const uint32_t bits = bits_of(a.v[i]);
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        p[i] = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

// Halves are folded 16 → 8 → 4 → 2 → 1: the same tree on every instruction set.
inline float sum(F a) {
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
    }
    return a.v[0];
}
inline F sums(const F* a) {  // lane j is sum(a[j])
    F r;
    PTQ_LANES r.v[i] = sum(a[i]);
    return r;
}
inline float max_of(F a) {
    float r = a.v[0];
    PTQ_LANES r = a.v[i] > r ? a.v[i] : r;
    return r;
}

#undef PTQ_LANES

}  // namespace ptq::PTQ_NS
