// The order in which the CPU kernels read weights, and the conversions from and to the storage format of
// ptq4arvg_kernels/packing.py (row-major; 8 bits: one byte per code; 6 bits: four codes in three bytes).
//
// Output channels are cut into panels of 16, K into blocks of 16. Panels follow each other; so do the blocks inside a
// panel. A vector is 64 bytes: lane c (four bytes) belongs to channel c, byte b of the lane to k = 4 g + b, where g is
// the vector's number: what one `vpdpbusd`, or two `vpmaddubsw`, multiply with four broadcast activations.
//
//   8 bits, block of 256 bytes:  vector g = 0..3:  | u(0,4g) u(0,4g+1) u(0,4g+2) u(0,4g+3) | u(1,4g) ... | ...
//   u(15,4g+3) |
//                                with u(c,k) = w + 128
//   6 bits, block of 192 bytes:  vector g = 0..2:  byte = u(c,4g+b) | part << 6,  u = w + 32
//                                part = bits 2g, 2g+1 of u(c,12+b): the fourth vector lives in the spare bits
//
// K is padded to a multiple of 32 and the channels to whole panels, both with w = 0. A paired layer [w1; w3] pads
// each half to whole panels, so that panel p and panel p + half hold channels that belong together.
#pragma once

#include <cstdint>

#include "../types.h"

namespace ptq {

constexpr int64_t PANEL = 16, BLOCK = 16, K_ALIGN = 32;

PTQ_INLINE int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}
PTQ_INLINE int64_t padded_k(int64_t in_features) {
    return round_up(in_features, K_ALIGN);
}
PTQ_INLINE int64_t block_bytes(int bits) {
    return bits == 6 ? 192 : 256;
}
PTQ_INLINE int64_t panel_bytes(int64_t in_features, int bits) {
    return padded_k(in_features) / BLOCK * block_bytes(bits);
}
PTQ_INLINE int64_t panel_count(int64_t out_features, bool paired) {
    return paired ? 2 * round_up(out_features / 2, PANEL) / PANEL : round_up(out_features, PANEL) / PANEL;
}

// A row of activation codes, zeros behind it up to the padded length.
PTQ_INLINE void pad_row(const int8_t* codes, int64_t in_features, int64_t padded, int8_t* out) {
    __builtin_memcpy(out, codes, static_cast<size_t>(in_features));
    __builtin_memset(out + in_features, 0, static_cast<size_t>(padded - in_features));
}

struct PackShape {
    int64_t out_features, in_features;
    int bits;
    bool paired;

    PTQ_INLINE int64_t row_bytes() const { return padded_k(in_features) * bits / 8; }
    PTQ_INLINE int64_t bytes() const { return panel_count(out_features, paired) * panel_bytes(in_features, bits); }
    // Channel in lane c of a panel, or -1 for padding.
    PTQ_INLINE int64_t channel(int64_t panel, int64_t lane) const {
        const int64_t half = out_features / 2, panels = panel_count(out_features, true) / 2;
        if (!paired) {
            const int64_t channel = panel * PANEL + lane;
            return channel < out_features ? channel : -1;
        }
        const int64_t within = (panel % panels) * PANEL + lane;
        return within < half ? within + (panel / panels) * half : -1;
    }
};

// Storage format → panels; false if a byte is one the format never contains (corrupt data, or padding that is not 0).
// Threads share the panels.
bool pack_panels(const PackShape& shape, const uint8_t* rows, uint8_t* panels, int threads);

// Panels → storage format, the exact inverse.
void unpack_panels(const PackShape& shape, const uint8_t* panels, uint8_t* rows, int threads);

}  // namespace ptq
