// Numbers between memory and registers: vectors of a floating type that is known at run time, rounding to codes, rows
// of position tables. Indices out of range are clamped to what they select from: a wrong index gives a wrong result,
// never an access outside an operand.
//
// A dtype is the same for all threads of a launch, so a switch over it is a uniform branch: once per vector, not per
// element.
#pragma once

#include "../types.h"

namespace ptq::cuda {

// --- floating point
// ---------------------------------------------------------------------------------------------------

// p + i elements
__device__ __forceinline__ const void* at(const void* p, DType dtype, int64_t i) {
    return static_cast<const char*>(p) + i * dtype_size(dtype);
}
__device__ __forceinline__ void* at(void* p, DType dtype, int64_t i) {
    return static_cast<char*>(p) + i * dtype_size(dtype);
}

// One word holds elements 2i (low half) and 2i + 1 (high half).
__device__ __forceinline__ void widen_f16(uint32_t word, float& low, float& high) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(word));
}
__device__ __forceinline__ void widen_bf16(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xFFFF0000u);
}
// Round to nearest, half to even.
__device__ __forceinline__ uint32_t narrow_f16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ uint32_t narrow_bf16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// N neighbouring elements as they came from memory: N words of float32, or N / 2 words of a half type. Fetching and
// widening are apart, so that many loads can be on their way before the first is waited for.
template <int N>
struct Raw {
    static_assert(N == 2 || N == 4 || N == 8, "vectors of 2, 4 or 8 elements");
    uint32_t word[N];
};

// COUNT words from an address divisible by 4 COUNT, or by 16.
template <int COUNT>
__device__ __forceinline__ void load_words(const void* p, uint32_t* word) {
    if constexpr (COUNT == 1) {
        word[0] = *static_cast<const uint32_t*>(p);
    } else if constexpr (COUNT == 2) {
        const uint2 v = *static_cast<const uint2*>(p);
        word[0] = v.x, word[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT / 4; ++i) {
            const uint4 v = static_cast<const uint4*>(p)[i];
            word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
        }
    }
}
template <int COUNT>
__device__ __forceinline__ void store_words(void* p, const uint32_t* word) {
    if constexpr (COUNT == 1) {
        *static_cast<uint32_t*>(p) = word[0];
    } else if constexpr (COUNT == 2) {
        *static_cast<uint2*>(p) = make_uint2(word[0], word[1]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT / 4; ++i) {
            static_cast<uint4*>(p)[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
        }
    }
}

// N elements at p; the address is divisible by their size, or by 16 if that is less.
template <int N>
__device__ __forceinline__ Raw<N> fetch(const void* p, DType dtype) {
    Raw<N> raw;
    if (dtype == DType::f32) {
        load_words<N>(p, raw.word);
    } else {
        load_words<N / 2>(p, raw.word);
    }
    return raw;
}

// The first `count` of N elements, one by one, from any address; zeros for the others. count may be 0 or less, and then
// p is not touched.
template <int N>
__device__ __forceinline__ Raw<N> fetch_some(const void* p, DType dtype, int count) {
    Raw<N> raw;
    if (dtype == DType::f32) {
#pragma unroll
        for (int i = 0; i < N; ++i) raw.word[i] = i < count ? static_cast<const uint32_t*>(p)[i] : 0;
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const uint32_t low = 2 * i < count ? static_cast<const uint16_t*>(p)[2 * i] : 0;
            const uint32_t high = 2 * i + 1 < count ? static_cast<const uint16_t*>(p)[2 * i + 1] : 0;
            raw.word[i] = low | high << 16;
        }
    }
    return raw;
}

template <int N>
__device__ __forceinline__ void widen(const Raw<N>& raw, DType dtype, float (&v)[N]) {
    if (dtype == DType::f16) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) widen_f16(raw.word[i], v[2 * i], v[2 * i + 1]);
    } else if (dtype == DType::bf16) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) widen_bf16(raw.word[i], v[2 * i], v[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = __uint_as_float(raw.word[i]);
    }
}

__device__ __forceinline__ float load_float(const void* p, DType dtype, int64_t i) {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    const uint32_t word = static_cast<const uint16_t*>(p)[i];
    float low, high;
    if (dtype == DType::f16) {
        widen_f16(word, low, high);
    } else {
        widen_bf16(word, low, high);
    }
    return low;
}

// Rounds N floats to a dtype, in the words that memory will hold.
template <int N>
__device__ __forceinline__ Raw<N> narrow(DType dtype, const float (&v)[N]) {
    Raw<N> raw;
    if (dtype == DType::f16) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) raw.word[i] = narrow_f16(v[2 * i], v[2 * i + 1]);
    } else if (dtype == DType::bf16) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) raw.word[i] = narrow_bf16(v[2 * i], v[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) raw.word[i] = __float_as_uint(v[i]);
    }
    return raw;
}

// N elements, rounded to the dtype; alignment as for fetch. One branch, that the stores are part of: otherwise the
// words would meet behind it.
template <int N>
__device__ __forceinline__ void store_floats(void* p, DType dtype, const float (&v)[N]) {
    uint32_t word[N / 2];
    if (dtype == DType::f16) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) word[i] = narrow_f16(v[2 * i], v[2 * i + 1]);
        store_words<N / 2>(p, word);
    } else if (dtype == DType::bf16) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) word[i] = narrow_bf16(v[2 * i], v[2 * i + 1]);
        store_words<N / 2>(p, word);
    } else {
        store_words<N>(p, narrow(dtype, v).word);
    }
}

// The first `count` of N elements, one by one, to any address.
template <int N>
__device__ __forceinline__ void store_floats_some(void* p, DType dtype, int count, const float (&v)[N]) {
    const Raw<N> raw = narrow(dtype, v);
    if (dtype == DType::f32) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i < count) static_cast<uint32_t*>(p)[i] = raw.word[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint32_t word = i % 2 ? raw.word[i / 2] >> 16 : raw.word[i / 2];
            if (i < count) static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(word);
        }
    }
}

// --- codes
// ------------------------------------------------------------------------------------------------------------

// q = clamp(rne(x * recip) + zq, -half, half - 1)
//
// Adding 1.5 * 2^23 to a float of at most 2^22 rounds it to an integer, half to even, and leaves that integer in the
// low bits of the sum; a larger one is clamped all the same, since rounding is monotonic. The zero point comes after
// the rounding: before it, an odd one would turn the ties around. The product is rounded on its own. A NaN becomes the
// lowest code: fmaxf returns its other argument.
struct Quantizer {
    static constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23

    float recip, zq, low, high;

    __device__ __forceinline__ Quantizer(float recip, float zq, float half)
        : recip(recip), zq(zq), low(SHIFT - half), high(SHIFT + half - 1.0f) {}
    // The four numbers as they were.
    __device__ __forceinline__ explicit Quantizer(const float4& q) : recip(q.x), zq(q.y), low(q.z), high(q.w) {}
    __device__ __forceinline__ explicit Quantizer(const Grid& grid) : Quantizer(grid.recip, grid.zq, grid.half()) {}

    // A word whose lowest byte is the code.
    __device__ __forceinline__ uint32_t operator()(float x) const {
        const float shifted = __fadd_rn(__fadd_rn(__fmul_rn(x, recip), SHIFT), zq);
        return __float_as_uint(fminf(fmaxf(shifted, low), high));
    }
};

// The lowest bytes of four words, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Codes of N floats, four per word.
template <int N>
__device__ __forceinline__ void to_codes(const Quantizer& quantizer, const float (&v)[N], uint32_t (&codes)[N / 4]) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
        codes[i] =
            pack_bytes(quantizer(v[4 * i]), quantizer(v[4 * i + 1]), quantizer(v[4 * i + 2]), quantizer(v[4 * i + 3]));
    }
}

// sum + the four signed bytes of a word
__device__ __forceinline__ int32_t add_codes(uint32_t word, int32_t sum) {
    return __dp4a(static_cast<int32_t>(word), 0x01010101, sum);
}

// --- indices
// ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t clamp_index(int64_t i, int64_t count) {
    return larger(0, smaller(i, count - 1));
}

// index[i], clamped to [0, count); i itself without an index.
__device__ __forceinline__ int64_t pick(const int32_t* index, int64_t i, int64_t count) {
    return index ? clamp_index(index[i], count) : i;
}

// positions[i], as it is. Asking and using are apart: between them other loads can start.
struct PositionLoad {
    int64_t wide = 0;
    int32_t narrow = 0;
    bool is_wide;

    __device__ __forceinline__ PositionLoad(const void* positions, bool wide, int64_t i, bool ask = true)
        : is_wide(wide) {
        if (!ask) return;
        if (is_wide) {
            this->wide = static_cast<const int64_t*>(positions)[i];
        } else {
            narrow = static_cast<const int32_t*>(positions)[i];
        }
    }
    __device__ __forceinline__ int64_t value() const { return is_wide ? wide : narrow; }
};
__device__ __forceinline__ int64_t position_at(const void* positions, bool wide, int64_t i) {
    return PositionLoad(positions, wide, i).value();
}

__device__ __forceinline__ Grid load_grid(const Grid* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {v.x, v.y, v.z, v.w};
}

// The grid of a row of a batch-major operand: table[positions[row % period]].
__device__ __forceinline__ Grid table_row(const Grid* table, int64_t length, const void* positions, bool wide,
                                          uint32_t period, uint32_t row) {
    return load_grid(table + clamp_index(position_at(positions, wide, row % period), length));
}

}  // namespace ptq::cuda
