// What the products with vector registers have in common, unlike those with tile registers (gemm_amx.h).
#pragma once

#include "../types.h"
#include "gemm_panels.h"

namespace ptq::PTQ_NS {

constexpr bool WHOLE_TILES = false;          // rows may be shared out evenly: a tile of fewer rows costs less
constexpr int64_t CHUNK_BYTES = 512 * 1024;  // activations of one chunk of rows: they stay in the second-level cache

// Rows that a tile computes for `rows` of `all`: no more than it has to.
inline int64_t tile_rows_for(int64_t rows, int64_t /*all*/) {
    return rows;
}

// State of a task's tile registers.
struct TileScope {};

}  // namespace ptq::PTQ_NS
