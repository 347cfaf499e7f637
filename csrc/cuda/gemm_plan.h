// How a product is cut into thread blocks: a pure function of the shape and the device.
#pragma once

#include <vector>

#include "device.h"
#include "gemm_tile.h"
#include "launch.h"

namespace ptq::cuda {

struct GemmShape {
    int64_t rows = 0;             // M
    int channels = 0, width = 0;  // N (both halves of a paired layer), K
    int bits = 8;                 // of the weights
    Output output = Output::store;
};

struct GemmPlan {
    GemmShape shape;
    int tile = 0;                  // of TILES, or NORM_TILES
    bool norm = false;             // normalises its rows itself
    unsigned grid[3] = {0, 0, 0};  // row tiles, column tiles, parts of K
    unsigned shared = 0;           // dynamic shared memory, bytes
    int part_bricks = 0;
    int64_t partial = 0;   // int32 numbers: GemmParams::partial
    int64_t counters = 0;  // GemmParams::counters, 0 before the first launch
    double cycles = 0;     // predicted, of a multiprocessor; only to compare plans

    const TileShape& tile_shape() const { return norm ? NORM_TILES[tile] : TILES[tile]; }
    // Bytes that all blocks ask memory for, of weights, codes and partial sums.
    double asked() const;
};

// Throws std::invalid_argument with the size that is not possible.
GemmPlan plan_gemm(const GemmShape& shape, const DeviceInfo& device);

// All plans that fit the device, the cheapest first: for measurements and tests.
std::vector<GemmPlan> gemm_plans(const GemmShape& shape, const DeviceInfo& device);

// A kernel that normalises up to NORM_ROWS rows itself. False if there is none for the shape and the device.
bool plan_gemm_norm(const GemmShape& shape, const DeviceInfo& device, GemmPlan* plan);

// Whether such a kernel can read these rows: vectors of eight numbers, aligned.
bool norm_readable(const NormPointers& in, const NormSettings& norm);

// The launch of a plan; fills what the plan knows into p, which stays alive until it starts. Throws
// std::invalid_argument for operands that are not aligned.
Launch launch_gemm(const GemmPlan& plan, GemmParams& p);

Kernel gemm_kernel(int bits, Output output, int tile, bool norm);

// gemm_w*_*.cu
Kernel gemm_w6_store(int tile);
Kernel gemm_w6_quant(int tile);
Kernel gemm_w6_gate_residual(int tile);
Kernel gemm_w8_store(int tile);
Kernel gemm_w8_quant(int tile);
Kernel gemm_w8_gate_residual(int tile);
Kernel gemm_norm_w6_store(int tile);
Kernel gemm_norm_w6_quant(int tile);
Kernel gemm_norm_w8_store(int tile);
Kernel gemm_norm_w8_quant(int tile);

}  // namespace ptq::cuda
