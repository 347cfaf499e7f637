#include "pack.h"

#include <atomic>
#include <cstring>

#include "threads.h"

namespace ptq {
namespace {

// Unsigned codes u = w + 2^(bits-1) of one stored row, in the order of k.
void read_row(const uint8_t* row, int bits, int64_t padded, uint8_t* u) {
    if (bits == 8) {
        for (int64_t k = 0; k < padded; ++k) u[k] = row[k] ^ 0x80;
        return;
    }
    for (int64_t k = 0; k < padded; k += 4, row += 3) {
        for (int i = 0; i < 3; ++i) u[k + i] = row[i] & 63;
        u[k + 3] = static_cast<uint8_t>((row[0] >> 6) | (row[1] >> 6) << 2 | (row[2] >> 6) << 4);
    }
}

void write_row(const uint8_t* u, int bits, int64_t padded, uint8_t* row) {
    if (bits == 8) {
        for (int64_t k = 0; k < padded; ++k) row[k] = u[k] ^ 0x80;
        return;
    }
    for (int64_t k = 0; k < padded; k += 4, row += 3) {
        for (int i = 0; i < 3; ++i) row[i] = static_cast<uint8_t>(u[k + i] | ((u[k + 3] >> (2 * i)) & 3) << 6);
    }
}

// u = 0 would be w = -2^(bits-1), outside the symmetric grid; padding holds w = 0.
bool lawful(const uint8_t* u, int bits, int64_t in_features, int64_t padded) {
    const uint8_t zero = static_cast<uint8_t>(1 << (bits - 1));
    bool good = true;
    for (int64_t k = 0; k < in_features; ++k) good &= u[k] != 0;
    for (int64_t k = in_features; k < padded; ++k) good &= u[k] == zero;
    return good;
}

// The codes of one panel, [padded / 4][16 lanes][4]: what the vectors hold before the fourth is folded into the others.
void fold_block(const uint8_t* vectors, int bits, uint8_t* block) {
    if (bits == 8) {
        std::memcpy(block, vectors, 256);
        return;
    }
    for (int g = 0; g < 3; ++g) {
        for (int i = 0; i < 64; ++i) {
            block[64 * g + i] = static_cast<uint8_t>(vectors[64 * g + i] | ((vectors[192 + i] >> (2 * g)) & 3) << 6);
        }
    }
}

void unfold_block(const uint8_t* block, int bits, uint8_t* vectors) {
    if (bits == 8) {
        std::memcpy(vectors, block, 256);
        return;
    }
    for (int i = 0; i < 64; ++i) {
        for (int g = 0; g < 3; ++g) vectors[64 * g + i] = block[64 * g + i] & 63;
        vectors[192 + i] =
            static_cast<uint8_t>((block[i] >> 6) | (block[64 + i] >> 6) << 2 | (block[128 + i] >> 6) << 4);
    }
}

}  // namespace

bool pack_panels(const PackShape& shape, const uint8_t* rows, uint8_t* panels, int threads) {
    const int64_t padded = padded_k(shape.in_features), size = panel_bytes(shape.in_features, shape.bits);
    std::atomic<bool> good{true};
    parallel(threads, panel_count(shape.out_features, shape.paired), [&](int64_t panel) {
        uint8_t* vectors = static_cast<uint8_t*>(thread_scratch(padded * PANEL + padded));
        uint8_t* u = vectors + padded * PANEL;
        std::memset(vectors, 1 << (shape.bits - 1), static_cast<size_t>(padded * PANEL));
        for (int64_t lane = 0; lane < PANEL; ++lane) {
            const int64_t channel = shape.channel(panel, lane);
            if (channel < 0) continue;
            read_row(rows + channel * shape.row_bytes(), shape.bits, padded, u);
            if (!lawful(u, shape.bits, shape.in_features, padded)) good = false;
            for (int64_t k = 0; k < padded; k += 4) std::memcpy(vectors + k * PANEL + lane * 4, u + k, 4);
        }
        uint8_t* out = panels + panel * size;
        for (int64_t k = 0; k < padded; k += BLOCK, out += block_bytes(shape.bits)) {
            fold_block(vectors + k * PANEL, shape.bits, out);
        }
    });
    return good;
}

void unpack_panels(const PackShape& shape, const uint8_t* panels, uint8_t* rows, int threads) {
    const int64_t padded = padded_k(shape.in_features), size = panel_bytes(shape.in_features, shape.bits);
    parallel(threads, panel_count(shape.out_features, shape.paired), [&](int64_t panel) {
        uint8_t* vectors = static_cast<uint8_t*>(thread_scratch(padded * PANEL + padded));
        uint8_t* u = vectors + padded * PANEL;
        const uint8_t* in = panels + panel * size;
        for (int64_t k = 0; k < padded; k += BLOCK, in += block_bytes(shape.bits)) {
            unfold_block(in, shape.bits, vectors + k * PANEL);
        }
        for (int64_t lane = 0; lane < PANEL; ++lane) {
            const int64_t channel = shape.channel(panel, lane);
            if (channel < 0) continue;
            for (int64_t k = 0; k < padded; k += 4) std::memcpy(u + k, vectors + k * PANEL + lane * 4, 4);
            write_row(u, shape.bits, padded, rows + channel * shape.row_bytes());
        }
    });
}

}  // namespace ptq
