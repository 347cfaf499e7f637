// Shapes of GEMM tiles: what kernels are compiled for and plans choose from.
#pragma once

#include "gemm_params.h"

namespace ptq::cuda {

enum class Output : int { store = 0, quant = 1, gate_residual = 2 };

// A thread block computes 8 * GROUPS rows times 32 * WARPS_N channels. Warps lie side by side along the channels, and
// WARPS_K of them share a strip of channels, each with its own bricks; no two warps unpack the same weights. A step of
// the pipeline is DEPTH bricks per warp.
struct TileShape {
    int groups, warps_n, warps_k, depth, stages;

    PTQ_INLINE constexpr int rows() const { return 8 * groups; }
    PTQ_INLINE constexpr int channels() const { return STRIP * warps_n; }
    PTQ_INLINE constexpr int warps() const { return warps_n * warps_k; }
    PTQ_INLINE constexpr int threads() const { return 32 * warps(); }
    PTQ_INLINE constexpr int step_k() const { return BRICK_K * depth * warps_k; }

    // Rows of the activation tile are 16 bytes longer than what they hold: eight rows then begin in different banks,
    // since every multiple of 64 plus 16 is an odd multiple of 16.
    PTQ_INLINE static constexpr int pitch(int columns) { return columns + 16; }
    PTQ_INLINE static constexpr int brick_bytes(int bits) { return bits == 8 ? 2048 : 1536; }
    PTQ_INLINE constexpr int weight_bytes(int bits) const { return warps() * depth * brick_bytes(bits); }

    // Values leave the accumulators in units of four channels of one row per lane, 512 bytes of a warp. Without
    // WARPS_K a warp needs room for half of them at a time.
    PTQ_INLINE constexpr int units() const { return 2 * groups; }
    PTQ_INLINE constexpr int exchange_bytes() const {
        return warps() * 512 * (warps_k > 1 ? units() : (groups + 1) / 2 * 2);
    }
    // What the epilogue needs: of the grids of every row, and three numbers of every channel.
    static constexpr int ROW_BYTES = 32;
    PTQ_INLINE constexpr int constant_bytes() const { return rows() * ROW_BYTES + channels() * 12; }

    // Dynamic shared memory; of a kernel that normalises, with rows of `resident` columns.
    PTQ_INLINE constexpr int shared_bytes(int bits, int resident = 0) const {
        const int slot = weight_bytes(bits) + (resident ? 0 : rows() * pitch(step_k()));
        const int reused = stages * slot > exchange_bytes() ? stages * slot : exchange_bytes();
        return constant_bytes() + (resident ? rows() * pitch(resident) : 0) + reused;
    }
};

// From few rows to many; of equal rows, from wide to narrow.
constexpr TileShape TILES[] = {
    {2, 2, 2, 2, 4},   // 16 x 64
    {2, 1, 4, 2, 3},   // 16 x 32
    {4, 2, 2, 2, 3},   // 32 x 64
    {4, 1, 4, 1, 4},   // 32 x 32
    {8, 4, 1, 2, 3},   // 64 x 128
    {8, 2, 2, 1, 4},   // 64 x 64
    {13, 4, 1, 1, 3},  // 104 x 128
    {16, 4, 1, 1, 3},  // 128 x 128
};
static_assert(N_ALIGN % 128 == 0, "tiles end inside the packed weights");
constexpr int TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]);

// A kernel that normalises its own activations: rows it holds, and how wide they may be.
constexpr int NORM_ROWS = 16, NORM_SEGMENTS = 14, NORM_MAX_WIDTH = NORM_SEGMENTS * ROW_SEGMENT;
constexpr TileShape NORM_TILES[] = {
    {2, 2, 2, 2, 3},  // 16 x 64
    {2, 1, 4, 2, 3},  // 16 x 32
};
constexpr int NORM_TILE_COUNT = sizeof(NORM_TILES) / sizeof(NORM_TILES[0]);

// The numbers of the tiles above, and their names in kernels.
#define PTQ_GEMM_TILES(DO, ...) \
    DO(0, 16x64, __VA_ARGS__)   \
    DO(1, 16x32, __VA_ARGS__)   \
    DO(2, 32x64, __VA_ARGS__)   \
    DO(3, 32x32, __VA_ARGS__)   \
    DO(4, 64x128, __VA_ARGS__)  \
    DO(5, 64x64, __VA_ARGS__)   \
    DO(6, 104x128, __VA_ARGS__) \
    DO(7, 128x128, __VA_ARGS__)
#define PTQ_GEMM_NORM_TILES(DO, ...) \
    DO(0, 16x64, __VA_ARGS__)        \
    DO(1, 16x32, __VA_ARGS__)

}  // namespace ptq::cuda
