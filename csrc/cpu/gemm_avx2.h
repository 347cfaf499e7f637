// Integer products with `vpmaddubsw` (unsigned weight u = w + 32, signed activation) and `vpmaddwd`.
//
// 6-bit weights: a `vpmaddubsw` lane is the sum of two products. Sums stay in 16 bits as long as they cannot overflow,
//     6-bit activations: 8 sums,  8 * 2 * 63 * 32  = 32256 < 2^15
//     8-bit activations: 2 sums,  2 * 2 * 63 * 128 = 32256 < 2^15
// and are then widened by `vpmaddwd` with ones.
// 8-bit weights: one `vpmaddubsw` can overflow (2 * 255 * 128), so both operands are widened to 16 bits. Of the four
// bytes k..k+3 of a channel, (k, k+2) are the low bytes of two 16-bit lanes and (k+1, k+3) the high ones: a shift each
// widens them, with their sign, to the pairs that `vpmaddwd` multiplies; activations are stored in that order.
#pragma once

#include "gemm_vector.h"
#include "isa.h"
#include "pack.h"
#include "prefetch.h"

namespace ptq::PTQ_NS {

constexpr int TILE_PANELS = 1;  // one panel: two registers of eight channels
constexpr int TILE_ROWS = 4;
constexpr int DIRECT_GROUP = 4;
constexpr int INTERLEAVED_ROWS = DIRECT_GROUP + 1;  // never

// Up to here weights are unpacked in registers, DIRECT_GROUP rows in one pass over a panel. Widening 8-bit weights
// takes as many instructions as multiplying two rows.
inline int64_t direct_limit(int bits) {
    return bits == 6 ? 4 : 2;
}
// What is added to every weight code, and therefore has to be taken out again with the row sums.
inline int32_t weight_offset(int bits) {
    return bits == 6 ? 32 : 0;
}

// 8-bit weights: int16 activations, the four of k..k+3 in the order k, k+2, k+1, k+3.
inline int64_t operand_row_bytes(int64_t padded, int bits) {
    return bits == 6 ? padded : 2 * padded;
}
inline bool operand_is_codes(int bits) {
    return bits == 6;
}
inline void convert_row(const int8_t* codes, int64_t in_features, int64_t padded, int bits, int8_t* out) {
    if (bits == 6) return pad_row(codes, in_features, padded, out);
    int16_t* wide = reinterpret_cast<int16_t*>(out);
    for (int64_t k = 0; k < padded; k += 4, wide += 4) {
        int16_t four[4];
        for (int i = 0; i < 4; ++i) four[i] = k + i < in_features ? codes[k + i] : 0;
        wide[0] = four[0];
        wide[1] = four[2];
        wide[2] = four[1];
        wide[3] = four[3];
    }
}

inline __m256i load32(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store32(uint8_t* p, __m256i a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
inline __m256i broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
inline __m256i add_to(const int32_t* sum, __m256i a) {
    return _mm256_add_epi32(load8i(sum), a);
}
// sum += a, in this order: left to itself, GCC 12 rebalances a chain of additions into a tree whose leaves it spills.
inline void add16(__m256i& sum, __m256i a) {
    sum = _mm256_add_epi16(sum, a);
    asm("" : "+x"(sum));
}
inline void add32(__m256i& sum, __m256i a) {
    sum = _mm256_add_epi32(sum, a);
    asm("" : "+x"(sum));
}
inline __m256i widen_sums(__m256i a) {
    return _mm256_madd_epi16(a, _mm256_set1_epi16(1));
}

// Four vectors of eight channels, u = w + 32. The 16-bit shifts drag bits over byte borders, which the masks remove.
struct Block6 {
    __m256i w[4];
};
inline Block6 unpack6(const uint8_t* p) {
    const __m256i a = load32(p), b = load32(p + 64), c = load32(p + 128), low = _mm256_set1_epi8(63);
    const __m256i a6 = _mm256_and_si256(_mm256_srli_epi16(a, 6), _mm256_set1_epi8(0x03));
    const __m256i b4 = _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(0x0c));
    const __m256i c2 = _mm256_and_si256(_mm256_srli_epi16(c, 2), _mm256_set1_epi8(0x30));
    return {{_mm256_and_si256(a, low), _mm256_and_si256(b, low), _mm256_and_si256(c, low),
             _mm256_or_si256(_mm256_or_si256(a6, b4), c2)}};
}

// Pairs of one vector of 8-bit weights.
struct Pairs {
    __m256i even, odd;  // (k, k+2), (k+1, k+3)
};
inline Pairs widen_weights(__m256i u) {
    const __m256i w = _mm256_xor_si256(u, _mm256_set1_epi8(static_cast<char>(0x80)));
    return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}

// SUMS: how many `vpmaddubsw` of one lane may be added in 16 bits, 8 or 2.
template <int SUMS, int ROWS>
void direct6(const int8_t* a, int64_t stride, const uint8_t* panel, Stream stream, int64_t padded, int32_t* acc,
             int64_t acc_stride) {
    __m256i total[ROWS][2];
    for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < padded; k += 2 * BLOCK, panel += 2 * 192) {
        stream.fetch();
        stream.fetch();
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m256i sum[ROWS];
            for (int r = 0; r < ROWS; ++r) sum[r] = _mm256_setzero_si256();
#pragma GCC unroll 2
            for (int block = 0; block < 2; ++block) {
                const Block6 u = unpack6(panel + 192 * block + 32 * half);
#pragma GCC unroll 4
                for (int g = 0; g < 4; ++g) {
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; ++r) {
                        const __m256i q = broadcast4(a + r * stride + k + 16 * block + 4 * g);
                        add16(sum[r], _mm256_maddubs_epi16(u.w[g], q));
                        if (SUMS == 2 && g % 2 == 1) {
                            add32(total[r][half], widen_sums(sum[r]));
                            sum[r] = _mm256_setzero_si256();
                        }
                    }
                }
            }
            if (SUMS == 8) {
                for (int r = 0; r < ROWS; ++r) add32(total[r][half], widen_sums(sum[r]));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        store8i(acc + r * acc_stride, total[r][0]);
        store8i(acc + r * acc_stride + 8, total[r][1]);
    }
}

template <int ROWS>
void direct8(const int8_t* a, int64_t stride, const uint8_t* panel, Stream stream, int64_t padded, int32_t* acc,
             int64_t acc_stride) {
    __m256i total[ROWS][2];
    for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < padded; k += 4, panel += 64) {
        if (k % BLOCK == 0) stream.fetch();
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const Pairs w = widen_weights(load32(panel + 32 * half));
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const int8_t* q = a + r * stride + 2 * k;
                const __m256i even = _mm256_madd_epi16(w.even, broadcast4(q)),
                              odd = _mm256_madd_epi16(w.odd, broadcast4(q + 4));
                add32(total[r][half], even);
                add32(total[r][half], odd);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        store8i(acc + r * acc_stride, total[r][0]);
        store8i(acc + r * acc_stride + 8, total[r][1]);
    }
}

// One unpacked panel, [padded / 4][64], with ROWS rows. The int32 sums live in `acc`, in the first-level cache: the
// 16-bit ones need the registers.
template <int SUMS, int ROWS>
void tile6(const int8_t* a, int64_t stride, const uint8_t* w, int64_t padded, int32_t* acc, int64_t acc_stride,
           const Prefetch& prefetch) {
    for (int r = 0; r < ROWS; ++r) {
        for (int half = 0; half < 2; ++half) store8i(acc + r * acc_stride + 8 * half, _mm256_setzero_si256());
    }
    constexpr int STEP = SUMS;  // groups of four k between two widenings
    const char* ahead = prefetch.next;
    for (int64_t k = 0; k < padded; k += 4 * STEP) {
        if (k % BLOCK == 0) {
            const int lines = prefetch.lines * (4 * STEP > BLOCK ? 4 * STEP / static_cast<int>(BLOCK) : 1);
            for (int line = 0; line < lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        }
        __m256i sum[ROWS][2];
#pragma GCC unroll 8
        for (int g = 0; g < STEP; ++g, w += 64) {
            const __m256i low = load32(w), high = load32(w + 32);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m256i q = broadcast4(a + r * stride + k + 4 * g);
                const __m256i first = _mm256_maddubs_epi16(low, q), second = _mm256_maddubs_epi16(high, q);
                if (g == 0) {
                    sum[r][0] = first;
                    sum[r][1] = second;
                } else {
                    add16(sum[r][0], first);
                    add16(sum[r][1], second);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            int32_t* out = acc + r * acc_stride;
            store8i(out, add_to(out, widen_sums(sum[r][0])));
            store8i(out + 8, add_to(out + 8, widen_sums(sum[r][1])));
        }
    }
}

// Unpacked as int16 pairs, [padded / 4][even low, even high, odd low, odd high][32].
template <int ROWS>
void tile8(const int8_t* a, int64_t stride, const uint8_t* w, int64_t padded, int32_t* acc, int64_t acc_stride,
           const Prefetch& prefetch) {
    __m256i sum[ROWS][2];
    for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    const char* ahead = prefetch.next;
    for (int64_t k = 0; k < padded; k += BLOCK) {
        for (int line = 0; line < prefetch.lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int pair = 0; pair < 8; ++pair, w += 64) {
            const __m256i low = load32(w), high = load32(w + 32);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m256i q = broadcast4(a + r * stride + 2 * k + 4 * pair);
                add32(sum[r][0], _mm256_madd_epi16(low, q));
                add32(sum[r][1], _mm256_madd_epi16(high, q));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        store8i(acc + r * acc_stride, sum[r][0]);
        store8i(acc + r * acc_stride + 8, sum[r][1]);
    }
}

// Tiles find their panels unpacked.
inline bool reads_stored(int /*bits*/, const TilePanels& /*panels*/) {
    return false;
}
inline int64_t unpacked_panel_bytes(int64_t padded, int bits) {
    return padded * PANEL * (bits == 6 ? 1 : 2);
}

inline void unpack_panel(const uint8_t* panel, int64_t padded, int bits, int /*index*/, int /*count*/, uint8_t* out) {
    if (bits == 6) {
        for (int64_t k = 0; k < padded; k += BLOCK, panel += 192, out += 256) {
            for (int half = 0; half < 2; ++half) {
                const Block6 u = unpack6(panel + 32 * half);
                for (int g = 0; g < 4; ++g) store32(out + 64 * g + 32 * half, u.w[g]);
            }
        }
        return;
    }
    for (int64_t k = 0; k < padded; k += 4, panel += 64, out += 128) {
        for (int half = 0; half < 2; ++half) {
            const Pairs w = widen_weights(load32(panel + 32 * half));
            store32(out + 32 * half, w.even);
            store32(out + 64 + 32 * half, w.odd);
        }
    }
}

template <int ROWS>
inline void direct_rows(int bits, int act_bits, const int8_t* a, int64_t stride, const uint8_t* panel, Stream stream,
                        int64_t padded, int32_t* acc, int64_t acc_stride) {
    if (bits == 8) return direct8<ROWS>(a, stride, panel, stream, padded, acc, acc_stride);
    if (act_bits == 8) return direct6<2, ROWS>(a, stride, panel, stream, padded, acc, acc_stride);
    return direct6<8, ROWS>(a, stride, panel, stream, padded, acc, acc_stride);
}

template <int ROWS>
inline void tile_rows(int bits, int act_bits, const int8_t* a, int64_t stride, const uint8_t* w, int64_t padded,
                      int32_t* acc, int64_t acc_stride, const Prefetch& prefetch) {
    if (bits == 8) return tile8<ROWS>(a, stride, w, padded, acc, acc_stride, prefetch);
    if (act_bits == 8) return tile6<2, ROWS>(a, stride, w, padded, acc, acc_stride, prefetch);
    return tile6<8, ROWS>(a, stride, w, padded, acc, acc_stride, prefetch);
}

inline void direct(int rows, int bits, int act_bits, const int8_t* a, int64_t stride, const uint8_t* panel,
                   Stream stream, int64_t padded, int32_t* acc, int64_t acc_stride) {
    switch (rows) {
        case 1:
            return direct_rows<1>(bits, act_bits, a, stride, panel, stream, padded, acc, acc_stride);
        case 2:
            return direct_rows<2>(bits, act_bits, a, stride, panel, stream, padded, acc, acc_stride);
        case 3:
            return direct_rows<3>(bits, act_bits, a, stride, panel, stream, padded, acc, acc_stride);
        case 4:
            return direct_rows<4>(bits, act_bits, a, stride, panel, stream, padded, acc, acc_stride);
    }
}

inline void tile(TileScope& /*scope*/, int /*panels*/, int rows, int bits, int act_bits, const int8_t* a,
                 int64_t stride, const TilePanels& weights, int64_t padded, int32_t* acc, int64_t acc_stride,
                 const Prefetch& prefetch) {
    const uint8_t* w = weights.unpacked;
    switch (rows) {
        case 1:
            return tile_rows<1>(bits, act_bits, a, stride, w, padded, acc, acc_stride, prefetch);
        case 2:
            return tile_rows<2>(bits, act_bits, a, stride, w, padded, acc, acc_stride, prefetch);
        case 3:
            return tile_rows<3>(bits, act_bits, a, stride, w, padded, acc, acc_stride, prefetch);
        case 4:
            return tile_rows<4>(bits, act_bits, a, stride, w, padded, acc, acc_stride, prefetch);
    }
}

}  // namespace ptq::PTQ_NS
