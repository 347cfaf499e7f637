// Many rows with AVX-512 VNNI: a tile of unpacked panels, and a few rows at a time. See gemm_vnni.h for few rows.
#pragma once

#include "gemm_vector.h"
#include "gemm_vnni.h"

namespace ptq::PTQ_NS {

constexpr int TILE_PANELS = 4;  // panels (64 channels) a tile multiplies at once
constexpr int TILE_ROWS = 6;    // 6 x 4 accumulators, 4 weights, 1 activation: 29 registers

// Up to here weights are unpacked in registers, DIRECT_GROUP rows in one pass over a panel.
inline int64_t direct_limit(int /*bits*/) {
    return 24;
}
// Activations are read as they are, K padded to 32 with zeros.
inline int64_t operand_row_bytes(int64_t padded, int /*bits*/) {
    return padded;
}
inline bool operand_is_codes(int /*bits*/) {
    return true;
}
inline void convert_row(const int8_t* codes, int64_t in_features, int64_t padded, int /*bits*/, int8_t* out) {
    pad_row(codes, in_features, padded, out);
}

inline __m512i broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

// PANELS panels of bytes with ROWS rows. A vector of the next panel is `panel_step` bytes further on, the next vector
// of the same panel `step`.
template <int PANELS, int ROWS>
void tile_rows(const int8_t* a, int64_t stride, const uint8_t* w, int64_t panel_step, int64_t step, int64_t padded,
               int32_t* acc, int64_t acc_stride, const Prefetch& prefetch) {
    __m512i sum[ROWS][PANELS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) sum[r][p] = _mm512_setzero_si512();
    }
    const char* ahead = prefetch.next;
    for (int64_t k = 0; k < padded; k += BLOCK) {
        for (int line = 0; line < prefetch.lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g, w += step) {
            __m512i weight[PANELS];
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) weight[p] = _mm512_loadu_si512(w + p * panel_step);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r) {
                const __m512i activation = broadcast4(a + r * stride + k + 4 * g);
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; ++p) multiply_add(sum[r][p], weight[p], activation);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) _mm512_storeu_si512(acc + r * acc_stride + 16 * p, sum[r][p]);
    }
}

// Codes of 8 bits are multiplied where they are stored.
inline bool reads_stored(int bits, const TilePanels& panels) {
    return bits == 8 && panels.stored_stride != 0;
}

// Bytes of the unpacked panels of a tile: interleaved as [padded / 4][panels][64].
inline int64_t unpacked_panel_bytes(int64_t padded, int /*bits*/) {
    return padded * PANEL;
}

inline void unpack_panel(const uint8_t* panel, int64_t padded, int bits, int index, int count, uint8_t* out) {
    out += 64 * index;
    for (int64_t k = 0; k < padded; k += BLOCK, panel += block_bytes(bits)) {
        const Block block = unpack_block(panel, bits);
        for (int g = 0; g < 4; ++g, out += 64 * count) _mm512_store_si512(out, block.w[g]);
    }
}

#define PTQ_TILE(p, r) \
    case 8 * p + r:    \
        return tile_rows<p, r>(a, stride, w, panel_step, step, padded, acc, acc_stride, prefetch);
#define PTQ_TILES(p) PTQ_TILE(p, 1) PTQ_TILE(p, 2) PTQ_TILE(p, 3) PTQ_TILE(p, 4) PTQ_TILE(p, 5) PTQ_TILE(p, 6)
inline void tile(TileScope& /*scope*/, int panels, int rows, int bits, int /*act_bits*/, const int8_t* a,
                 int64_t stride, const TilePanels& weights, int64_t padded, int32_t* acc, int64_t acc_stride,
                 const Prefetch& prefetch) {
    const bool stored = reads_stored(bits, weights);
    const uint8_t* w = stored ? weights.stored : weights.unpacked;
    const int64_t panel_step = stored ? weights.stored_stride : 64, step = stored ? 64 : 64 * panels;
    switch (8 * panels + rows) { PTQ_TILES(1) PTQ_TILES(2) PTQ_TILES(3) PTQ_TILES(4) }
}
#undef PTQ_TILES
#undef PTQ_TILE

}  // namespace ptq::PTQ_NS
