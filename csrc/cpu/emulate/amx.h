// The AMX instructions that the kernels use, in plain C++ after Intel's description of each. What the hardware refuses
// (a tile that is not configured, shapes that do not fit together) stops the process here too.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace ptq {

struct Tile {
    int rows = 0, row_bytes = 0;
    uint8_t bytes[16][64] = {};
};
inline thread_local Tile emulated_tiles[8];

inline void demand(bool good) {
    if (!good) abort();
}
inline Tile& configured(int tile) {
    demand(emulated_tiles[tile].rows > 0);
    return emulated_tiles[tile];
}

inline void _tile_loadconfig(const void* shapes) {
    const uint8_t* p = static_cast<const uint8_t*>(shapes);
    demand(p[0] == 1 && p[1] == 0);
    for (int t = 0; t < 8; ++t) {
        uint16_t row_bytes;
        memcpy(&row_bytes, p + 16 + 2 * t, 2);
        const int rows = p[48 + t];
        demand(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0));
        emulated_tiles[t] = Tile{};
        emulated_tiles[t].rows = rows;
        emulated_tiles[t].row_bytes = row_bytes;
    }
}
inline void _tile_release() {
    for (Tile& tile : emulated_tiles) tile = Tile{};
}
inline void _tile_zero(int tile) {
    memset(configured(tile).bytes, 0, sizeof(Tile::bytes));
}
inline void _tile_loadd(int tile, const void* base, int64_t stride) {
    Tile& t = configured(tile);
    memset(t.bytes, 0, sizeof t.bytes);
    for (int r = 0; r < t.rows; ++r) {
        memcpy(t.bytes[r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(t.row_bytes));
    }
}
inline void _tile_stored(int tile, void* base, int64_t stride) {
    const Tile& t = configured(tile);
    for (int r = 0; r < t.rows; ++r) {
        memcpy(static_cast<char*>(base) + r * stride, t.bytes[r], static_cast<size_t>(t.row_bytes));
    }
}
// sum[m][n] += signed a[m][4 k + i] * unsigned b[k][4 n + i] over k and i.
inline void _tile_dpbsud(int sum, int a, int b) {
    Tile &c = configured(sum), &x = configured(a), &y = configured(b);
    demand(c.rows == x.rows && c.row_bytes == y.row_bytes && x.row_bytes == 4 * y.rows);
    for (int m = 0; m < c.rows; ++m) {
        for (int n = 0; n < c.row_bytes / 4; ++n) {
            uint32_t total;
            memcpy(&total, c.bytes[m] + 4 * n, 4);
            for (int i = 0; i < x.row_bytes; ++i) {
                const int q = static_cast<int8_t>(x.bytes[m][i]), w = y.bytes[i / 4][4 * n + i % 4];
                total += static_cast<uint32_t>(q * w);
            }
            memcpy(c.bytes[m] + 4 * n, &total, 4);
        }
    }
}

}  // namespace ptq
