// Integer products in plain C++: int32 sums of unsigned weight u = w + 2^(bits-1) times signed activation.
#pragma once

#include "gemm_vector.h"
#include "isa.h"
#include "pack.h"
#include "prefetch.h"

namespace ptq::PTQ_NS {

constexpr int TILE_PANELS = 1;
constexpr int TILE_ROWS = 4;
constexpr int DIRECT_GROUP = 2;
constexpr int INTERLEAVED_ROWS = DIRECT_GROUP + 1;  // never

// Up to here weights are unpacked block by block.
inline int64_t direct_limit(int /*bits*/) {
    return 2;
}
// What is added to every weight code, and therefore has to be taken out again with the row sums.
inline int32_t weight_offset(int bits) {
    return bits == 6 ? 32 : 128;
}

inline int64_t operand_row_bytes(int64_t padded, int /*bits*/) {
    return padded;
}
inline bool operand_is_codes(int /*bits*/) {
    return true;
}
inline void convert_row(const int8_t* codes, int64_t in_features, int64_t padded, int /*bits*/, int8_t* out) {
    pad_row(codes, in_features, padded, out);
}

inline void unpack_block(const uint8_t* p, int bits, uint8_t* u) {
    if (bits == 8) {
        __builtin_memcpy(u, p, 256);
        return;
    }
    for (int i = 0; i < 64; ++i) {
        u[i] = p[i] & 63;
        u[64 + i] = p[64 + i] & 63;
        u[128 + i] = p[128 + i] & 63;
        u[192 + i] = static_cast<uint8_t>((p[i] >> 6) | (p[64 + i] >> 6) << 2 | (p[128 + i] >> 6) << 4);
    }
}

// Adds the products of one block, [4][16][4] weights, to the 16 sums of a row.
inline void multiply_block(const uint8_t* u, const int8_t* q, int32_t* sum) {
    for (int g = 0; g < 4; ++g, u += 64, q += 4) {
        for (int c = 0; c < 16; ++c) {
            sum[c] += u[4 * c] * q[0] + u[4 * c + 1] * q[1] + u[4 * c + 2] * q[2] + u[4 * c + 3] * q[3];
        }
    }
}

inline void direct(int rows, int bits, int /*act_bits*/, const int8_t* a, int64_t stride, const uint8_t* panel,
                   Stream /*stream*/, int64_t padded, int32_t* acc, int64_t acc_stride) {
    for (int r = 0; r < rows; ++r) __builtin_memset(acc + r * acc_stride, 0, 64);
    for (int64_t k = 0; k < padded; k += BLOCK, panel += block_bytes(bits)) {
        uint8_t u[256];
        unpack_block(panel, bits, u);
        for (int r = 0; r < rows; ++r) multiply_block(u, a + r * stride + k, acc + r * acc_stride);
    }
}

// Tiles find their panels unpacked.
inline bool reads_stored(int /*bits*/, const TilePanels& /*panels*/) {
    return false;
}
inline int64_t unpacked_panel_bytes(int64_t padded, int /*bits*/) {
    return padded * PANEL;
}

inline void unpack_panel(const uint8_t* panel, int64_t padded, int bits, int /*index*/, int /*count*/, uint8_t* out) {
    for (int64_t k = 0; k < padded; k += BLOCK, panel += block_bytes(bits), out += 256) unpack_block(panel, bits, out);
}

inline void tile(TileScope& /*scope*/, int /*panels*/, int rows, int /*bits*/, int /*act_bits*/, const int8_t* a,
                 int64_t stride, const TilePanels& weights, int64_t padded, int32_t* acc, int64_t acc_stride,
                 const Prefetch& /*prefetch*/) {
    const uint8_t* w = weights.unpacked;
    for (int r = 0; r < rows; ++r) __builtin_memset(acc + r * acc_stride, 0, 64);
    for (int64_t k = 0; k < padded; k += BLOCK, w += 256) {
        for (int r = 0; r < rows; ++r) multiply_block(w, a + r * stride + k, acc + r * acc_stride);
    }
}

}  // namespace ptq::PTQ_NS
