// GEMM kernels for every tile, of one width of the weights and one output, and a function that finds them. Each pair
// has a file of its own, so that they compile side by side.
#pragma once

#include "gemm.cuh"
#include "gemm_plan.h"

// Two blocks of few threads share a multiprocessor's registers.
#define PTQ_GEMM_KERNEL(I, NAME, BITS, OUTPUT, NORM, TILES)                                                        \
    extern "C" __global__ void __launch_bounds__(ptq::cuda::TILES[I].threads(), 2)                                 \
        gemm##NORM##_w##BITS##_##NAME##_##OUTPUT(const __grid_constant__ ptq::cuda::GemmParams p) {                \
        using namespace ptq::cuda;                                                                                 \
        constexpr TileShape T = TILES[I];                                                                          \
        gemm_tile<BITS, T.groups, T.warps_n, T.warps_k, T.depth, T.stages, Output::OUTPUT, sizeof(#NORM) != 1>(p); \
    }
#define PTQ_GEMM_CASE(I, NAME, BITS, OUTPUT, NORM, TILES)      \
    case I:                                                    \
        return {"gemm" #NORM "_w" #BITS "_" #NAME "_" #OUTPUT, \
                reinterpret_cast<const void*>(gemm##NORM##_w##BITS##_##NAME##_##OUTPUT)};

#define PTQ_GEMM_KERNELS(BITS, OUTPUT)                                         \
    PTQ_GEMM_TILES(PTQ_GEMM_KERNEL, BITS, OUTPUT, , TILES)                     \
    ptq::cuda::Kernel ptq::cuda::gemm_w##BITS##_##OUTPUT(int tile) {           \
        switch (tile) { PTQ_GEMM_TILES(PTQ_GEMM_CASE, BITS, OUTPUT, , TILES) } \
        return {};                                                             \
    }
#define PTQ_GEMM_NORM_KERNELS(BITS, OUTPUT)                                                   \
    PTQ_GEMM_NORM_TILES(PTQ_GEMM_KERNEL, BITS, OUTPUT, _norm, NORM_TILES)                     \
    ptq::cuda::Kernel ptq::cuda::gemm_norm_w##BITS##_##OUTPUT(int tile) {                     \
        switch (tile) { PTQ_GEMM_NORM_TILES(PTQ_GEMM_CASE, BITS, OUTPUT, _norm, NORM_TILES) } \
        return {};                                                                            \
    }
