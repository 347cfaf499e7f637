// Checks that read data, before a kernel follows it. They say only that something is wrong: the caller finds out what,
// and says so, in Python.
#pragma once

#include <cmath>

#include "kernels.h"

namespace ptq {

inline bool lawful(const Grid& g, bool eight_only) {
    if (!(g.bits == 8.0f || (g.bits == 6.0f && !eight_only))) return false;
    return std::isfinite(g.delta) && g.delta > 0.0f && g.recip == 1.0f / g.delta && g.zq == std::nearbyint(g.zq) &&
           g.zq >= -g.half() && g.zq < g.half();
}

inline bool in_range(const Positions& positions, int64_t length) {
    for (int64_t i = 0; i < positions.count; ++i) {
        if (positions.at(i) < 0 || positions.at(i) >= length) return false;
    }
    return true;
}

// Positions inside the table, and lawful rows there.
inline bool good_table(const Table& table, const Positions& positions) {
    if (!in_range(positions, table.length)) return false;
    for (int64_t i = 0; i < positions.count; ++i) {
        if (!lawful(table.rows[positions.at(i)], false)) return false;
    }
    return true;
}

inline int largest_bits(const Table& table, const Positions& positions) {
    for (int64_t i = 0; i < positions.count; ++i) {
        if (table.rows[positions.at(i)].bits == 8.0f) return 8;
    }
    return 6;
}

inline bool good_map(const RowMap& map, int64_t rows, int64_t sources) {
    for (int64_t i = 0; map.index && i < rows; ++i) {
        if (map.index[i] < 0 || map.index[i] >= sources) return false;
    }
    return true;
}

inline bool good_cache_tables(const CacheTables& tables, int64_t groups, int64_t heads) {
    for (int64_t i = 0; i < groups * heads; ++i) {
        if (!lawful(tables.k[i], true) || !lawful(tables.v[i], true)) return false;
    }
    return true;
}

inline bool distinct(const Positions& positions) {
    for (int64_t i = 1; i < positions.count; ++i) {
        if (positions.at(i) > positions.at(i - 1)) continue;  // ascending, as nearly always
        for (int64_t a = 0; a < positions.count; ++a) {
            for (int64_t b = 0; b < a; ++b) {
                if (positions.at(a) == positions.at(b)) return false;
            }
        }
        return true;
    }
    return true;
}

}  // namespace ptq
