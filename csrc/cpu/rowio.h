// 16 lanes to and from memory of any floating dtype, and the quantizer.
#pragma once

#include "isa.h"

namespace ptq::PTQ_NS {

// Lanes n and above are 0 when fewer than 16 are asked for.
inline F load(const void* p, DType dtype, int64_t offset, int64_t n = LANES) {
    if (dtype == DType::f32) {
        const float* q = static_cast<const float*>(p) + offset;
        return n >= LANES ? load(q) : load_n(q, n);
    }
    const uint16_t* q = static_cast<const uint16_t*>(p) + offset;
    if (n < LANES) {
        uint16_t part[LANES] = {};
        for (int64_t i = 0; i < n; ++i) part[i] = q[i];
        return dtype == DType::f16 ? load_f16(part) : load_bf16(part);
    }
    return dtype == DType::f16 ? load_f16(q) : load_bf16(q);
}

inline void store(void* p, DType dtype, int64_t offset, F a, int64_t n = LANES) {
    if (dtype == DType::f32) {
        float* q = static_cast<float*>(p) + offset;
        n >= LANES ? store(q, a) : store_n(q, a, n);
        return;
    }
    uint16_t* q = static_cast<uint16_t*>(p) + offset;
    uint16_t part[LANES];
    uint16_t* target = n >= LANES ? q : part;
    dtype == DType::f16 ? store_f16(target, a) : store_bf16(target, a);
    for (int64_t i = 0; n < LANES && i < n; ++i) q[i] = part[i];
}

// q = clamp(rne(x * recip) + zq, low, high): one multiply, round half to even, add and clamp in float. A NaN gives the
// code `low`; callers look at finite() first.
struct Quantizer {
    F recip, zq, low, high;

    explicit Quantizer(const Grid& grid)
        : recip(set1(grid.recip)), zq(set1(grid.zq)), low(set1(-grid.half())), high(set1(grid.half() - 1.0f)) {}

    I operator()(F x) const { return to_int(min(max(round_even(x * recip) + zq, low), high)); }
};

}  // namespace ptq::PTQ_NS
