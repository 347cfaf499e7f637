// Shapes of attention tiles: what kernels are compiled for, plans choose from and tests enumerate.
#pragma once

#include "attention_params.h"

namespace ptq::cuda {

// A thread block serves up to 4 * FOURS queries of one sequence and head. Its warps take turns at the slots, 16 at a
// time; each has a ring of STAGES such tiles of keys and values in shared memory. CHUNKS: 16 bytes each of a cached
// vector, its padding included.
constexpr int SLOT_TILE = 16;

struct AttentionShape {
    int chunks, fours, stages;

    PTQ_INLINE constexpr int queries() const { return 4 * fours; }
    PTQ_INLINE constexpr int columns() const { return 16 * chunks; }
    PTQ_INLINE constexpr int ring_bytes() const { return stages * 2 * SLOT_TILE * columns(); }  // of a warp
    // What a warp leaves for the others at the end, in the memory of its ring: rows of sums, eight floats longer than
    // what they hold (lanes then write to different banks), tops and weights.
    PTQ_INLINE constexpr int pitch() const { return columns() + 8; }
    PTQ_INLINE constexpr int merge_bytes() const { return 4 * queries() * (pitch() + 2); }
    // What a thread block leaves for the others, in the workspace: sums, tops, weights.
    PTQ_INLINE constexpr int part_floats() const { return queries() * (columns() + 2); }
};

constexpr int MAX_ATTENTION_WARPS = 8, MAX_BLOCK_WARPS = 4;  // of a block; with many queries

// Head dimensions of 1 to 256, by the padded length of their class.
constexpr int HEAD_CLASSES = 7;
constexpr AttentionShape DECODE_SHAPES[HEAD_CLASSES] = {{3, 1, 3}, {4, 1, 3}, {5, 1, 3}, {6, 1, 3},
                                                        {7, 1, 3}, {8, 1, 3}, {16, 1, 2}};
constexpr AttentionShape BLOCK_SHAPES[HEAD_CLASSES] = {{3, 4, 3}, {4, 4, 3}, {5, 4, 3}, {6, 4, 3},
                                                       {7, 4, 3}, {8, 4, 3}, {16, 2, 2}};

// As named in kernels: decode_d64
#define PTQ_HEAD_CLASSES(DO) DO(0, 48) DO(1, 64) DO(2, 80) DO(3, 96) DO(4, 112) DO(5, 128) DO(6, 256)

}  // namespace ptq::cuda
