// Parameters of the GEMM kernels. Pointers come first (launch.h); nullptr is an absent operand.
#pragma once

#include "rows_params.h"

namespace ptq::cuda {

// K of a brick, and what K is padded to with zeros: two bricks. Channels of a strip, and what N is padded to, so that
// every warp of a tile has a strip.
constexpr int BRICK_K = 64, K_ALIGN = 128, STRIP = 32, N_ALIGN = 128;

struct GemmParams {
    static constexpr int POINTERS = 21;

    const int8_t* codes;      // [M, K], rows codes_stride bytes apart; not read by a kernel that normalises
    const uint8_t* weights;   // packed (ptq4arvg_kernels/backends/cuda/weights.py)
    void* out;                // floats [M, N], or codes [M, N] or (paired) [M, N / 2], dense
    int32_t* sums;            // quant: the row sums of the codes are added; nullptr if nobody wants them
    const float* scale;       // [N]; paired: [w1; w3]
    const int32_t* col_sums;  // [N]
    const float* bias;        // [N] or nullptr
    const Grid* table;        // of the input
    const void* positions;    // [P]
    const Grid* out_table;    // quant: of the output
    const void* gate;         // gate_residual: [gate_count, N] or nullptr
    const int32_t* gate_rows;
    const void* residual;    // gate_residual: [M, N], dense
    int32_t* partial;        // sums of the parts of K, where it is split
    unsigned int* counters;  // one per tile, 0 before and after
    NormPointers norm_in;    // of a kernel that normalises

    int64_t rows, codes_stride;
    int64_t gate_count, gate_stride;  // elements from one row to the next
    int64_t out_length;
    int channels, width;  // N, K: a multiple of 16
    int bricks;           // of a strip of the packed weights
    int part_bricks;      // of a thread block: its part of K, in whole steps
    int paired;           // channels alternate between w1 and w3
    GridSettings grids;
    Activation activation;
    DType out_dtype, gate_dtype;  // residual has the dtype of out
    NormSettings norm;
};

}  // namespace ptq::cuda
