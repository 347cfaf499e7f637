// Rows in eights: a lane holds eight neighbouring columns, 16 bytes of a half type, so that a warp holds a segment of
// 256 columns. `count` is how many of the eight exist: 8 or more, fewer at the end of a row, 0 or less behind it. What
// does not exist is read as 0.
#pragma once

#include "numbers.cuh"

namespace ptq::cuda {

constexpr int OCTET = 8;
constexpr int SEGMENT = 32 * OCTET;
constexpr unsigned FULL_WARP = 0xFFFFFFFFu;

// Sum over groups of `lanes` neighbouring lanes (a power of two); every lane gets it, with the same bits. All lanes of
// the warp take part.
template <typename T>
__device__ __forceinline__ T group_sum(T v, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset >>= 1) v += __shfl_xor_sync(FULL_WARP, v, offset);
    return v;
}

__device__ __forceinline__ float octet_sum(const float (&v)[OCTET]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
__device__ __forceinline__ float octet_square_sum(const float (&v)[OCTET]) {
    float even = v[0] * v[0], odd = v[1] * v[1];
#pragma unroll
    for (int i = 2; i < OCTET; i += 2) {
        even = __fmaf_rn(v[i], v[i], even);
        odd = __fmaf_rn(v[i + 1], v[i + 1], odd);
    }
    return even + odd;
}

// What is known of the addresses of octets. Octets: each begins at a multiple of 16 bytes, and exists or does not.
// Quads: often only every four elements do.
enum class Aligned { unknown, quads, octets };

template <Aligned ALIGNED = Aligned::unknown>
__device__ __forceinline__ Raw<OCTET> fetch_octet(const void* p, DType dtype, int count) {
    Raw<OCTET> raw = {};
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if constexpr (ALIGNED == Aligned::octets) {
        if (count >= OCTET) raw = fetch<OCTET>(p, dtype);
        return raw;
    }
    if (count >= OCTET && address % 16 == 0) {
        raw = fetch<OCTET>(p, dtype);
    } else if (ALIGNED == Aligned::quads && count >= 4 && count % 4 == 0 &&
               address % (dtype == DType::f32 ? 16 : 8) == 0) {
        const bool two = count >= OCTET;
        if (dtype == DType::f32) {
            load_words<4>(p, raw.word);
            if (two) load_words<4>(at(p, dtype, 4), raw.word + 4);
        } else {
            load_words<2>(p, raw.word);
            if (two) load_words<2>(at(p, dtype, 4), raw.word + 2);
        }
    } else if (count > 0) {
        raw = fetch_some<OCTET>(p, dtype, count);
    }
    return raw;
}

template <Aligned ALIGNED = Aligned::unknown>
__device__ __forceinline__ void load_octet(const void* p, DType dtype, int count, float (&v)[OCTET]) {
    widen(fetch_octet<ALIGNED>(p, dtype, count), dtype, v);
}

__device__ __forceinline__ void store_octet(void* p, DType dtype, int count, const float (&v)[OCTET]) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (count >= OCTET && address % 16 == 0) {
        store_floats(p, dtype, v);
    } else if (count >= 4 && count % 4 == 0 && address % (dtype == DType::f32 ? 16 : 8) == 0) {
        store_floats(p, dtype, {v[0], v[1], v[2], v[3]});
        if (count >= OCTET) store_floats(at(p, dtype, 4), dtype, {v[4], v[5], v[6], v[7]});
    } else if (count > 0) {
        store_floats_some(p, dtype, count, v);
    }
}

// Zeros in the bytes of columns that do not exist.
__device__ __forceinline__ void clear_codes(uint32_t (&codes)[2], int count) {
    if (count >= OCTET) return;
    const uint64_t mask = count > 0 ? (uint64_t{1} << 8 * count) - 1 : 0;
    codes[0] &= static_cast<uint32_t>(mask);
    codes[1] &= static_cast<uint32_t>(mask >> 32);
}

__device__ __forceinline__ void store_code_octet(int8_t* p, int count, const uint32_t (&codes)[2]) {
    if (count >= OCTET && reinterpret_cast<uintptr_t>(p) % 8 == 0) {
        store_words<2>(p, codes);
    } else if (count > 0) {
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            if (i < count) p[i] = static_cast<int8_t>(codes[i / 4] >> 8 * (i % 4));
        }
    }
}

}  // namespace ptq::cuda
