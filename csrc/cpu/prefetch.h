// Software prefetch. A product of few rows is faster than memory: what comes next is fetched while the present weights
// are multiplied, far enough ahead that one core keeps many lines in flight (the hardware prefetcher stops at page
// borders).
#pragma once

#include <cstdint>

#include "../types.h"

namespace ptq {

// For panels multiplied as they stream in: in every block, the lines of `step` bytes further on.
struct Stream {
    static constexpr int64_t AHEAD = 12288;  // bytes

    const char* next;
    int64_t step;  // bytes per block of 16 k

    PTQ_INLINE void fetch() {
        for (int64_t offset = 0; offset < step; offset += 64) __builtin_prefetch(next + offset, 0, 2);
        next += step;
    }
};

// For the panels of the next tile, which are wanted in the second-level cache: `lines` of them per block.
struct Prefetch {
    const char* next = nullptr;
    int lines = 0;
};

}  // namespace ptq
