// Kernels on rows, and how they are started: pure functions of the shapes.
#pragma once

#include <stdexcept>
#include <string>

#include "launch.h"
#include "rows_params.h"

namespace ptq::cuda {

constexpr unsigned QUANTIZE_THREADS = 512, ADALN_THREADS = 512, APPEND_THREADS = 128;

// rows.cu, qkv_append.cu
Kernel quantize_kernel();
Kernel adaln_quant_kernel(int held);  // 1 to 3 segments per warp
Kernel qkv_append_kernel();

inline unsigned row_grid(int64_t blocks) {
    if (blocks > 0x7FFFFFFF) {
        throw std::invalid_argument("an operand has " + std::to_string(blocks) +
                                    " rows (of heads), a launch at most 2^31 - 1; split it");
    }
    return static_cast<unsigned>(blocks);
}

// A warp per segment of 256 columns, a block per row; wider rows than 4096 columns take several turns.
inline Launch plan_quantize(const QuantizeParams& p, int64_t rows) {
    const int64_t segments = larger(1, ceil_div(p.width, ROW_SEGMENT));
    const unsigned threads = static_cast<unsigned>(32 * smaller(segments, QUANTIZE_THREADS / 32));
    return launch_of(quantize_kernel(), row_grid(rows), 1, 1, threads, 0, p);
}

// A block per row. A warp holds one segment in registers, two or three of rows wider than 4096 columns; it depends on
// the width alone.
inline Launch plan_adaln_quant(const AdalnParams& p, int64_t rows) {
    if (p.norm.width > MAX_ROW_WIDTH) {
        throw std::invalid_argument("adaln_quant holds rows of up to " + std::to_string(MAX_ROW_WIDTH) +
                                    " columns in registers, not of " + std::to_string(p.norm.width));
    }
    const int64_t segments = larger(1, ceil_div(p.norm.width, ROW_SEGMENT));
    const int64_t held = ceil_div(segments, ADALN_THREADS / 32);
    const unsigned threads = static_cast<unsigned>(32 * ceil_div(segments, held));
    return launch_of(adaln_quant_kernel(static_cast<int>(held)), row_grid(rows), 1, 1, threads, 0, p);
}

// Lanes that hold a head's vector in eights, its padding included: a power of two.
inline int head_group(int lanes) {
    int group = 1;
    while (8 * group < lanes) group *= 2;
    return group;
}

// A group of lanes per token and head. Few of them spread over more multiprocessors.
inline Launch plan_qkv_append(const AppendParams& p) {
    if (p.head_dim > MAX_HEAD_DIM) {
        throw std::invalid_argument("qkv_append holds heads of up to " + std::to_string(MAX_HEAD_DIM) +
                                    " values in registers, not of " + std::to_string(p.head_dim));
    }
    row_grid(p.items);  // items are counted in 32 bits
    const int64_t warps = ceil_div(p.items, 32 / head_group(p.lanes));
    const unsigned threads = warps <= 512 ? 32 : APPEND_THREADS;
    return launch_of(qkv_append_kernel(), row_grid(ceil_div(32 * warps, threads)), 1, 1, threads, 0, p);
}

}  // namespace ptq::cuda
