// Many rows with AMX: one `tdpbsud` multiplies 16 rows of 64 signed activations with 64 unsigned weights of 16
// channels. A block of panels is what a weight tile holds, four blocks to a tile: 8-bit weights are multiplied where
// they are stored. Few rows are bound by memory and take the vector instructions of gemm_vnni.h.
#pragma once

#include "amx.h"
#include "gemm_panels.h"
#include "gemm_vnni.h"

namespace ptq::PTQ_NS {

constexpr int TILE_PANELS = 2;  // 2 x 2 accumulators, so that a tile loaded is used twice
constexpr int TILE_ROWS = 32;
constexpr bool WHOLE_TILES = true;
constexpr int64_t CHUNK_BYTES = 1024 * 1024;
constexpr int64_t TILE_K = 64, TILE_BYTES = 1024;

inline int64_t direct_limit(int /*bits*/) {
    return 8;
}
// Activations are read as they are, K padded to whole tiles.
inline int64_t operand_row_bytes(int64_t padded, int /*bits*/) {
    return round_up(padded, TILE_K);
}
inline bool operand_is_codes(int /*bits*/) {
    return true;
}
inline void convert_row(const int8_t* codes, int64_t in_features, int64_t padded, int /*bits*/, int8_t* out) {
    pad_row(codes, in_features, round_up(padded, TILE_K), out);
}

// Rows that a tile computes for `rows` of `all`: whole tiles, if there are enough rows. To change the shape twice per
// pair of panels made 91 rows 16 % slower than 96.
inline int64_t tile_rows_for(int64_t rows, int64_t all) {
    return all < TILE_ROWS ? rows : rows > TILE_ROWS / 2 ? TILE_ROWS : TILE_ROWS / 2;
}
inline int64_t unpacked_panel_bytes(int64_t padded, int /*bits*/) {
    return round_up(padded, TILE_K) * PANEL;
}
// Weights of 8 bits that fill their tiles are multiplied where they are stored.
inline bool in_place(int64_t padded, int bits) {
    return bits == 8 && padded % TILE_K == 0;
}
// Tiles unpack what needs it while they multiply: see tile_steps.
inline bool reads_stored(int /*bits*/, const TilePanels& /*panels*/) {
    return true;
}
inline void unpack_panel(const uint8_t* /*panel*/, int64_t /*padded*/, int /*bits*/, int /*index*/, int /*count*/,
                         uint8_t* /*out*/) {}

// The blocks of one tile of K, of which `left` values of k are left. Behind K, u = 0 multiplies anything to 0.
inline void unpack_tile(const uint8_t* panel, int bits, int64_t left, uint8_t* out) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < TILE_K; k += BLOCK, panel += block_bytes(bits), out += 256) {
        const Block block = k < left ? unpack_block(panel, bits) : Block{};
        for (int g = 0; g < 4; ++g) _mm512_store_si512(out + 64 * g, block.w[g]);
    }
}

struct TileRows {
    const int8_t* a;
    int64_t stride;
    int32_t* acc;
    int64_t acc_stride;
};

// All of K for PANELS panels with one or two tiles of rows. With UNPACK, weights are unpacked a few tiles of K ahead of
// their products, for these rows and those that follow: both kinds of instructions are then in flight together.
template <int ROW_TILES, int PANELS, bool UNPACK>
void tile_steps(const TileRows& rows, const TilePanels& panels, int bits, int64_t padded, const Prefetch& prefetch) {
    constexpr int64_t LEAD = 2;  // tiles of K
    const int64_t steps = ceil_div(padded, TILE_K), packed = TILE_K / BLOCK * block_bytes(bits);
    const bool stored = in_place(padded, bits);
    const uint8_t* w = stored ? panels.stored : panels.unpacked;
    const int64_t panel_stride = stored ? panels.stored_stride : unpacked_panel_bytes(padded, bits);
    const auto unpack = [&](int64_t step) {
        for (int p = 0; p < PANELS; ++p) {
            unpack_tile(panels.stored + p * panels.stored_stride + step * packed, bits, padded - step * TILE_K,
                        panels.unpacked + p * panel_stride + step * TILE_BYTES);
        }
    };
    if (UNPACK) {
        for (int64_t step = 0; step < smaller(LEAD, steps); ++step) unpack(step);
    }
    const int8_t *upper = rows.a, *lower = rows.a + 16 * rows.stride;
    const char* ahead = prefetch.next;
    const int lines = prefetch.lines * static_cast<int>(TILE_K / BLOCK);
    _tile_zero(0);
    _tile_zero(1);
    if (ROW_TILES == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, upper += TILE_K, lower += TILE_K, w += TILE_BYTES) {
        for (int line = 0; line < lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        if (UNPACK && step + LEAD < steps) unpack(step + LEAD);
        order_tile_memory();
        _tile_loadd(4, w, 64);
        _tile_loadd(6, upper, rows.stride);
        _tile_dpbsud(0, 6, 4);
        if (ROW_TILES == 2) {
            _tile_loadd(7, lower, rows.stride);
            _tile_dpbsud(2, 7, 4);
        }
        if (PANELS == 2) {
            _tile_loadd(5, w + panel_stride, 64);
            _tile_dpbsud(1, 6, 5);
            if (ROW_TILES == 2) _tile_dpbsud(3, 7, 5);
        }
    }
    const int64_t bytes = rows.acc_stride * static_cast<int64_t>(sizeof(int32_t));
    int32_t *acc = rows.acc, *lower_acc = rows.acc + 16 * rows.acc_stride;
    _tile_stored(0, acc, bytes);
    if (PANELS == 2) _tile_stored(1, acc + PANEL, bytes);
    if (ROW_TILES == 2) {
        _tile_stored(2, lower_acc, bytes);
        if (PANELS == 2) _tile_stored(3, lower_acc + PANEL, bytes);
    }
    order_tile_memory();
}

template <int ROW_TILES, int PANELS>
void tile_steps(const TileRows& rows, const TilePanels& panels, int bits, int64_t padded, const Prefetch& prefetch) {
    if (!panels.first || in_place(padded, bits)) {
        return tile_steps<ROW_TILES, PANELS, false>(rows, panels, bits, padded, prefetch);
    }
    // A constant width lets the compiler drop the other one's instructions.
    if (bits == 6) return tile_steps<ROW_TILES, PANELS, true>(rows, panels, 6, padded, prefetch);
    tile_steps<ROW_TILES, PANELS, true>(rows, panels, 8, padded, prefetch);
}

inline void tile(TileScope& scope, int panels, int rows, int bits, int /*act_bits*/, const int8_t* a, int64_t stride,
                 const TilePanels& weights, int64_t padded, int32_t* acc, int64_t acc_stride,
                 const Prefetch& prefetch) {
    scope.shape(rows);
    const auto run = rows > 16 ? (panels == 2 ? tile_steps<2, 2> : tile_steps<2, 1>)
                               : (panels == 2 ? tile_steps<1, 2> : tile_steps<1, 1>);
    run({a, stride, acc, acc_stride}, weights, bits, padded, prefetch);
}

}  // namespace ptq::PTQ_NS
