// Integer products with `vpdpbusd`: four products of an unsigned weight u = w + 2^(bits-1) and a signed activation are
// added to an int32 lane, exactly. Every width of weights and activations takes the same path; 6 bits only move less.
// This file: few rows, weights unpacked in registers.
#pragma once

#include "isa.h"
#include "pack.h"
#include "prefetch.h"

namespace ptq::PTQ_NS {

constexpr int DIRECT_GROUP = 8;  // rows of one pass over a panel
// When the largest group has this many rows, activations are stored interleaved, [K / 4][rows][4] per group: one
// address serves all rows, where so many would not fit into the integer registers.
constexpr int INTERLEAVED_ROWS = 7;

// What is added to every weight code, and therefore has to be taken out again with the row sums.
inline int32_t weight_offset(int bits) {
    return bits == 6 ? 32 : 128;
}

#if defined(PTQ_EMULATE_AVX512)
inline void multiply_add(__m512i& sum, __m512i w, __m512i q) {
    sum = _mm512_dpbusd_epi32(sum, w, q);
}
inline void multiply_add(__m512i& sum, __m512i w, const int8_t* q) {
    int32_t four;
    __builtin_memcpy(&four, q, 4);
    sum = _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
}
#else
// sum += products of w and q. In assembly because GCC 12 copies and spills accumulators around the intrinsic.
inline void multiply_add(__m512i& sum, __m512i w, __m512i q) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(q));
}
// The same with four activations broadcast from memory to all lanes.
inline void multiply_add(__m512i& sum, __m512i w, const int8_t* q) {
    using Four [[gnu::may_alias, gnu::aligned(1)]] = int32_t;
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Four*>(q)));
}
#endif

struct Block {
    __m512i w[4];
};

// 6 bits: three ANDs, and the fourth vector from the spare bits; the 32-bit shifts drag bits over byte borders, which
// the masks remove. Ternary logic 0xf8 is a | (b & c).
inline Block unpack_block(const uint8_t* p, int bits) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64), c = _mm512_loadu_si512(p + 128);
    if (bits == 8) return {{a, b, c, _mm512_loadu_si512(p + 192)}};
    const __m512i low = _mm512_set1_epi8(63);
    __m512i last = _mm512_and_si512(_mm512_srli_epi32(a, 6), _mm512_set1_epi8(0x03));
    last = _mm512_ternarylogic_epi32(last, _mm512_srli_epi32(b, 4), _mm512_set1_epi8(0x0c), 0xf8);
    last = _mm512_ternarylogic_epi32(last, _mm512_srli_epi32(c, 2), _mm512_set1_epi8(0x30), 0xf8);
    return {{_mm512_and_si512(a, low), _mm512_and_si512(b, low), _mm512_and_si512(c, low), last}};
}

// One panel, `ROWS` rows, weights unpacked in registers. SETS accumulators per row hide the latency of few rows.
// `stride` 0 says that the rows are interleaved.
template <int BITS, int ROWS, bool INTERLEAVED>
void direct_rows(const int8_t* a, int64_t stride, const uint8_t* panel, Stream stream, int64_t padded, int32_t* acc,
                 int64_t acc_stride) {
    constexpr int SETS = ROWS <= 6 ? 4 : 2;
    __m512i sum[ROWS][SETS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < SETS; ++s) sum[r][s] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < padded; k += BLOCK, panel += BITS == 6 ? 192 : 256) {
        stream.fetch();
        const Block block = unpack_block(panel, BITS);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const int8_t* q = INTERLEAVED ? a + ROWS * (k + 4 * g) + 4 * r : a + r * stride + k + 4 * g;
                multiply_add(sum[r][g % SETS], block.w[g], q);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        __m512i total = _mm512_add_epi32(sum[r][0], sum[r][1]);
        if (SETS == 4) total = _mm512_add_epi32(total, _mm512_add_epi32(sum[r][2], sum[r][SETS - 1]));
        _mm512_storeu_si512(acc + r * acc_stride, total);
    }
}

#define PTQ_ROWS(r, interleaved)                                                                         \
    return bits == 6 ? direct_rows<6, r, interleaved>(a, stride, panel, stream, padded, acc, acc_stride) \
                     : direct_rows<8, r, interleaved>(a, stride, panel, stream, padded, acc, acc_stride);
inline void direct(int rows, int bits, int /*act_bits*/, const int8_t* a, int64_t stride, const uint8_t* panel,
                   Stream stream, int64_t padded, int32_t* acc, int64_t acc_stride) {
    if (stride == 0) {
        switch (rows) {
            case 6:
                PTQ_ROWS(6, true)
            case 7:
                PTQ_ROWS(7, true)
            case 8:
                PTQ_ROWS(8, true)
        }
        return;
    }
    switch (rows) {
        case 1:
            PTQ_ROWS(1, false)
        case 2:
            PTQ_ROWS(2, false)
        case 3:
            PTQ_ROWS(3, false)
        case 4:
            PTQ_ROWS(4, false)
        case 5:
            PTQ_ROWS(5, false)
        case 6:
            PTQ_ROWS(6, false)
    }
}
#undef PTQ_ROWS

}  // namespace ptq::PTQ_NS
