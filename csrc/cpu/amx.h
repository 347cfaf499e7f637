// The tile registers of AMX: 8 tiles of at most 16 rows of 64 bytes. Their shape is set per thread, and has to be given
// back when the work is done, so that the operating system need not save them.
#pragma once

#include "../types.h"

#if defined(PTQ_EMULATE_AVX512)
#include "emulate/amx.h"
#else
#include <immintrin.h>
#endif

namespace ptq::PTQ_NS {

// The operand of `ldtilecfg`.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "the processor reads 64 bytes");

// The intrinsics do not tell the compiler which memory they read or write.
inline void order_tile_memory() {
    asm volatile("" ::: "memory");
}

// The tiles of one task. Layout: accumulators 0 1 / 2 3 (two tiles of rows, two panels), weights 4 5, activations 6 7.
class TileScope {
  public:
    TileScope() = default;
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
    ~TileScope() {
        if (rows_ != 0) _tile_release();
    }

    // For `rows` rows of activations, 1 to 32. Setting the shapes takes longer than a step of products.
    void shape(int rows) {
        if (rows == rows_ || (rows == 16 && rows_ > 16)) return;  // 16 rows use the upper tiles only
        rows_ = rows;
        TileShapes shapes;
        const int upper = rows < 16 ? rows : 16, lower = rows - upper;
        set(shapes, 0, upper), set(shapes, 1, upper), set(shapes, 6, upper);
        set(shapes, 2, lower), set(shapes, 3, lower), set(shapes, 7, lower);
        set(shapes, 4, 16), set(shapes, 5, 16);
        order_tile_memory();
        _tile_loadconfig(&shapes);
    }

  private:
    static void set(TileShapes& shapes, int tile, int rows) {
        shapes.rows[tile] = static_cast<uint8_t>(rows);
        shapes.row_bytes[tile] = rows ? 64 : 0;
    }

    int rows_ = 0;
};

}  // namespace ptq::PTQ_NS
