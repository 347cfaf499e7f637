#pragma once

#include <cstdint>

namespace ptq {

// The panels of a tile: as they are stored, and the thread's scratch for them unpacked.
struct TilePanels {
    const uint8_t* stored;
    int64_t stored_stride;  // bytes from one panel of the tile to the next; 0 if they are not evenly spaced
    uint8_t* unpacked;
    bool first;  // these are the first rows to be multiplied with them
};

}  // namespace ptq
