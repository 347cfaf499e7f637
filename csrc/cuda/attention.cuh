// Attention over the INT8 cache on tensor cores, for one query per sequence and head (decode.cu) and for many
// (block_attention.cu):
//
//     out_i = sum_j p_ij v^_j / sum_j p_ij,   p_ij = exp(softmax_scale q_i . k^_j) for j < visible_end[i]
//     k^_j = (code - zq) delta, v^_j alike, with (delta, zq) of the group of slot j and the head
//
// The law keeps queries and probabilities in floating point. A half holds code - zq exactly, and two halves hold a
// query or a probability (attention_queries.cuh), so that all products are exact and sums are float32. Keys and values
// are the first operand of the matrix instruction, queries and probabilities the second: its eight columns are the two
// halves of four queries. One query pays for four; the loop waits for memory all the same.
//
//     keys:   a[16 slots x 16 values] b[16 values x (4 queries, 2 halves)] -> logits: lane 4 g + t has those of slots g
//             and g + 8 and query t, as two sums that it adds
//     values: a[16 values x 16 slots] b[16 slots x (4 queries, 2 halves)]: ldmatrix transposes the codes, movmatrix the
//             probabilities -> sums: lane 4 g + t has values 2 g and 2 g + 1 of every chunk, of query t
//
// Thread blocks: one per sequence and head, tile of queries, and part of the slots. Its warps take turns at tiles of 16
// slots. A warp copies tiles into a ring of its own and reads back what itself copied: no barrier in the loop.
//
//     a tile in shared memory: 16 keys, then 16 values, CHUNKS of 16 bytes each; chunk c of row r lies at
//     (r CHUNKS + c) ^ (r / (8 / Z) % Z), Z = gcd(CHUNKS, 8): eight rows of ldmatrix, and eight lanes of a copy, then
//     touch every bank once
//
// Bad data: indices are clamped to what they select from, a NaN stays one until it becomes the lowest code.
#pragma once

#include "attention_merge.cuh"
#include "copy.cuh"

namespace ptq::cuda {

// A logit may exceed the top by this much before the sums are scaled to a new one: tops grow seldom, and probabilities
// are at most 2^SLACK.
constexpr float SLACK = 4.0f;

template <int CHUNKS>
__device__ __forceinline__ constexpr int tile_chunk(int row, int chunk) {
    constexpr int Z = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;
    return (row * CHUNKS + chunk) ^ (row / (8 / Z) % Z);
}

// Copies of a warp: a ring of tiles, filled in order.
template <int CHUNKS, int STAGES>
struct SlotRing {
    static constexpr int KEYS = SLOT_TILE * CHUNKS * 16, TILE = 2 * KEYS;
    static constexpr int EACH = (SLOT_TILE * CHUNKS + 31) / 32;  // copies of a lane, of keys and of values

    uint32_t base;
    uint32_t to[EACH];            // in a tile
    const int8_t *keys, *values;  // of the next tile to be copied; this lane's first 16 bytes if rows have CHUNKS
    int64_t step;                 // bytes between the tiles of a warp
    int next, slots, last, skip;  // its first slot, slots between the tiles; slots >= last and the slot `skip` are not
                                  // read, zeros take their place
    int lanes;

    __device__ __forceinline__ SlotRing(const void* shared, int warp, int warps, const int8_t* k_rows,
                                        const int8_t* v_rows, int lanes, int first, int last, int skip)
        : base(shared_address(shared) + warp * (STAGES * TILE)),
          step(static_cast<int64_t>(warps * SLOT_TILE) * lanes),
          next(first + warp * SLOT_TILE),
          slots(warps * SLOT_TILE),
          last(last),
          skip(skip),
          lanes(lanes) {
        const int lane = static_cast<int>(threadIdx.x) & 31;
        const int64_t begin = static_cast<int64_t>(next) * lanes + (exact() ? 16 * lane : 0);
        keys = k_rows + begin;
        values = v_rows + begin;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int index = lane + 32 * i;
            to[i] = 16 * tile_chunk<CHUNKS>(index / CHUNKS, index % CHUNKS);
        }
    }

    // Rows of this length lie in memory as they do in a tile, but for the order of chunks.
    __device__ __forceinline__ bool exact() const { return lanes == 16 * CHUNKS; }
    __device__ __forceinline__ uint32_t slot(int stage) const { return base + stage * TILE; }

    __device__ __forceinline__ void copy(int stage) {
        if (next < last) {
            if (exact()) {
                copy_exact(slot(stage));
            } else {
                copy_shorter(slot(stage));
            }
        }
        commit_copies();
        next += slots;
        keys += step;
        values += step;
    }

  private:
    template <int I = 0>
    __device__ __forceinline__ void copy_exact(uint32_t tile) const {
        if constexpr (I < EACH) {
            const int index = (static_cast<int>(threadIdx.x) & 31) + 32 * I, row = next + index / CHUNKS;
            if (SLOT_TILE * CHUNKS % 32 == 0 || index < SLOT_TILE * CHUNKS) {
                const bool wanted = row < last && row != skip;
                copy_slot16<0, 512 * I>(tile + to[I], keys, wanted);
                copy_slot16<KEYS, 512 * I>(tile + to[I], values, wanted);
            }
            copy_exact<I + 1>(tile);
        }
    }
    __device__ __forceinline__ void copy_shorter(uint32_t tile) const {
#pragma unroll 1
        for (int index = static_cast<int>(threadIdx.x) & 31; index < SLOT_TILE * CHUNKS; index += 32) {
            const int row = index / CHUNKS, chunk = index % CHUNKS, offset = row * lanes + 16 * chunk;
            const bool wanted = next + row < last && next + row != skip && 16 * chunk < lanes;
            const uint32_t target = tile + 16 * tile_chunk<CHUNKS>(row, chunk);
            copy_slot16<0, 0>(target, keys + offset, wanted);
            copy_slot16<KEYS, 0>(target, values + offset, wanted);
        }
    }
};

// Probabilities, in halves, are multiplied by this: one that is 2^-30 of the largest is still held in 11 bits.
constexpr float UNIT = 1024.0f;

// Steps and zero points of a tile's slots, as the lanes need them: slots g and g + 8 for logits and probabilities, 2t,
// 2t + 1, 2t + 8 and 2t + 9 for values. Looked up when they change, which is seldom.
struct SlotGrids {
    uint32_t k_zero[2], v_zero[2];  // 1152 + zq, in pairs
    float k_step[2], k_rest[2];     // times softmax_scale * log2(e), as a sum of two
    float v_step[2];                // divided by v_unit, times UNIT
    float v_unit;                   // the largest step so far; sums are in units of v_unit / UNIT
    int group;                      // that all slots have; -1: not one group, or none yet
    bool table;  // kv_group says the group of a slot, and `ahead` is what it says of this lane's slot of a tile
    int ahead;   // to come; otherwise slots from `edge` on are in group 1
    int edge;

    __device__ __forceinline__ explicit SlotGrids(const AttentionParams& p)
        : v_unit(0.0f),
          group(-1),
          table(p.grouping == Grouping::table),
          ahead(0),
          edge(p.grouping == Grouping::one ? 0x7FFFFFFF : p.edge) {}

    // Asks for what the tile at `start` needs.
    __device__ __forceinline__ void fetch(const AttentionParams& p, int start, int last) {
        if (table && start < last) ahead = p.kv_group[own_slot(start, last)];
    }

    // Whether the tile at `start`, for which fetch was called last, needs other grids than those at hand. `own`: the
    // group of this lane's slot.
    __device__ __forceinline__ bool changed(const AttentionParams& p, int start, int& own) {
        int now;
        if (table) {
            own = static_cast<int>(clamp_index(ahead, p.groups));
            now = __all_sync(FULL_WARP, own == __shfl_sync(FULL_WARP, own, 0)) ? own : -1;
        } else {
            own = start + static_cast<int>(threadIdx.x) % SLOT_TILE >= edge;
            now = start >= edge ? 1 : start <= edge - SLOT_TILE ? 0 : -1;
        }
        const bool same = now >= 0 && now == group;
        group = now;
        return !same;
    }

    // `slots`: grids of keys and values by group. Returns what sums must be multiplied by.
    __device__ __forceinline__ float look_up(const AttentionParams& p, uint32_t head, int own,
                                             const Grid (&slots)[2][2]) {
        const int lane = static_cast<int>(threadIdx.x) & 31, g = lane >> 2, t = lane & 3;
        float k_delta, k_zq, v_delta, v_zq;
        if (table) {
            const int64_t row = static_cast<int64_t>(own) * p.heads + head;
            k_delta = p.k_table[row].delta, k_zq = p.k_table[row].zq;
            v_delta = p.v_table[row].delta, v_zq = p.v_table[row].zq;
        } else {
            k_delta = slots[0][own].delta, k_zq = slots[0][own].zq;
            v_delta = slots[1][own].delta, v_zq = slots[1][own].zq;
        }
        // Steps are positive, so that their bits are ordered as they are.
        const float before = v_unit;
        v_unit = __uint_as_float(max(__float_as_uint(v_unit), __reduce_max_sync(FULL_WARP, __float_as_uint(v_delta))));
        const float step = __fdiv_rn(v_delta, v_unit) * UNIT;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float zero = HALF_SHIFT + __shfl_sync(FULL_WARP, k_zq, g + 8 * h);
            k_zero[h] = narrow_f16(zero, zero);
            const float delta = __shfl_sync(FULL_WARP, k_delta, g + 8 * h);
            k_step[h] = delta * p.scale_high;
            k_rest[h] = __fmaf_rn(delta, p.scale_low, __fmaf_rn(delta, p.scale_high, -k_step[h]));
            v_step[h] = __shfl_sync(FULL_WARP, step, g + 8 * h);
            const float first = __shfl_sync(FULL_WARP, v_zq, 2 * t + 8 * h);
            const float second = __shfl_sync(FULL_WARP, v_zq, 2 * t + 1 + 8 * h);
            v_zero[h] = narrow_f16(HALF_SHIFT + first, HALF_SHIFT + second);
        }
        return before > 0.0f ? __fdiv_rn(before, v_unit) : 1.0f;  // without a unit, there are no sums
    }

  private:
    static __device__ __forceinline__ int own_slot(int start, int last) {
        return min(start + static_cast<int>(threadIdx.x) % SLOT_TILE, last - 1);
    }
};

// Operand a of one chunk from two words of a lane: slots g and g + 8 of keys, or both halves of transposed values.
__device__ __forceinline__ void key_operand(uint32_t (&a)[4], const uint32_t* word, const uint32_t (&zero)[2]) {
    a[0] = even_codes(word[0], zero[0]);
    a[1] = even_codes(word[1], zero[1]);
    a[2] = odd_codes(word[0], zero[0]);
    a[3] = odd_codes(word[1], zero[1]);
}
__device__ __forceinline__ void value_operand(uint32_t (&a)[4], const uint32_t* word, const uint32_t (&zero)[2]) {
    a[0] = even_codes(word[0], zero[0]);
    a[1] = odd_codes(word[0], zero[0]);
    a[2] = even_codes(word[1], zero[1]);
    a[3] = odd_codes(word[1], zero[1]);
}

// The words of chunks c and c + 1 (or of the last one alone) of 16 rows.
template <int CHUNKS, bool TRANSPOSED>
__device__ __forceinline__ void load_chunks(uint32_t (&word)[4], uint32_t tile, int c) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    if (c + 1 < CHUNKS) {
        load_bytes<4, TRANSPOSED>(word, tile + 16 * tile_chunk<CHUNKS>(lane & 15, c + (lane >> 4)));
    } else {
        load_bytes<2, TRANSPOSED>(word, tile + 16 * tile_chunk<CHUNKS>(lane & 15, c));
    }
}

// DECODE: k and v of a new token may be appended first; queries stay in registers.
template <int CHUNKS, int FOURS, int STAGES, bool DECODE>
__device__ __forceinline__ void attend(const AttentionParams& p) {
    using Ring = SlotRing<CHUNKS, STAGES>;
    constexpr AttentionShape SHAPE{CHUNKS, FOURS, STAGES};
    constexpr int QUERIES = SHAPE.queries();
    static_assert(SHAPE.merge_bytes() <= SHAPE.ring_bytes() && Ring::TILE * STAGES == SHAPE.ring_bytes(),
                  "warps leave their triples in the memory of their rings");
    extern __shared__ uint4 rings[];
    __shared__ Queries<CHUNKS, FOURS> queries;
    __shared__ uint2 fresh[DECODE ? 4 * CHUNKS : 1];

    const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
    const int warps = static_cast<int>(blockDim.x) >> 5, g = lane >> 2, t = lane & 3;
    const uint32_t pair = blockIdx.x, batch = pair / p.heads, head = pair - batch * p.heads;
    const int splits = static_cast<int>(gridDim.z), split = static_cast<int>(blockIdx.z);
    const uint32_t first_query = blockIdx.y * QUERIES;
    const int count = min(QUERIES, static_cast<int>(p.period - first_query));
    const bool append = DECODE && p.append;

    // What the queries see; the slots of this block.
    int64_t position = 0, slot = -1;
    if (append) {
        position = position_at(p.positions, p.wide, 0);
        slot = clamp_index(position, p.slots);
    }
    const int own_end = max(1, min(p.visible_end[first_query + min(lane, count - 1)], p.span));
    const int some_end = __reduce_max_sync(FULL_WARP, own_end), all_end = __reduce_min_sync(FULL_WARP, own_end);
    const int run = ((some_end + SLOT_TILE - 1) / SLOT_TILE + splits - 1) / splits * SLOT_TILE;
    const int first = split * run, last = min(first + run, some_end);
    const bool owner = append && split == static_cast<int>(smaller(slot / run, splits - 1));
    int end[FOURS];
#pragma unroll
    for (int n = 0; n < FOURS; ++n) end[n] = min(last, __shfl_sync(FULL_WARP, own_end, min(4 * n + t, count - 1)));

    int8_t* const k_rows = p.k_cache + batch * p.k.batch + head * p.k.head;
    int8_t* const v_rows = p.v_cache + batch * p.v.batch + head * p.v.head;
    Ring ring(rings, warp, warps, k_rows, v_rows, p.lanes, first, last, append ? static_cast<int>(slot) : -1);
    const auto fill = [&] {
#pragma unroll 1
        for (int stage = 0; stage < STAGES; ++stage) ring.copy(stage);
    };
    if (p.out_table && thread < count) {
        queries.grids[thread] =
            table_row(p.out_table, p.out_length, p.positions, p.wide, p.period, first_query + thread);
    }
    if (warp == 0) {
        const FirstGrids grids(p, head, slot, owner);
        if constexpr (DECODE) {
            if (append) {
                NewToken<CHUNKS> token(p, batch, head, slot, owner);
                fill();
                token.prepare(p, queries, grids, fresh, owner, position == slot, k_rows + slot * p.lanes,
                              v_rows + slot * p.lanes);
            } else {
                fill();
            }
        } else {
            fill();
        }
        grids.store(queries);
    } else {
        fill();
    }
    if (!append) load_queries(p, static_cast<int64_t>(pair) * p.period + first_query, count, queries);
    __syncthreads();

    // This lane's column of the queries; those that do not exist repeat the last one.
    uint2 operand[DECODE ? CHUNKS : 1];
    uint32_t columns[FOURS];
    float unit[FOURS], top[FOURS], weight[FOURS], sums[FOURS][CHUNKS][4];
#pragma unroll
    for (int n = 0; n < FOURS; ++n) {
        const int query = min(4 * n + (g >> 1), count - 1);
        columns[n] = (query / 4 * CHUNKS * 8 + query % 4 * 2 + (g & 1)) * 4 + t;
        unit[n] = queries.units[min(4 * n + t, count - 1)];
        top[n] = NOTHING_SEEN;
        weight[n] = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) sums[n][c][0] = sums[n][c][1] = sums[n][c][2] = sums[n][c][3] = 0.0f;
    }
    const uint2* const pairs = &queries.pairs[0][0][0][0];
    if constexpr (DECODE) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) operand[c] = pairs[columns[0] + c * 32];
    }
    const int full_end = min(all_end, last);
    const int fresh_tile = append ? static_cast<int>(slot) / SLOT_TILE * SLOT_TILE : -1;
    const auto scale_sums = [&](int n, float factor) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][c][i] *= factor;
        }
    };

    SlotGrids grids(p);
    grids.fetch(p, first + warp * SLOT_TILE, last);
    int stage = 0;
    for (int start = first + warp * SLOT_TILE; start < last; start += warps * SLOT_TILE) {
        int own;
        if (grids.changed(p, start, own)) {
            const float factor = grids.look_up(p, head, own, queries.slots);
            if (factor != 1.0f) {
#pragma unroll
                for (int n = 0; n < FOURS; ++n) scale_sums(n, factor);
            }
        }
        grids.fetch(p, start + warps * SLOT_TILE, last);
        wait_copies<STAGES - 1>();
        __syncwarp();
        const uint32_t keys = ring.slot(stage), values = keys + Ring::KEYS;
        if (start == fresh_tile) {
            const int chunk = lane % CHUNKS, row = static_cast<int>(slot) - start;
            uint4* const tile = rings + (warp * STAGES + stage) * (Ring::TILE / 16);
            if (lane < 2 * CHUNKS) {
                tile[(lane < CHUNKS ? 0 : SLOT_TILE * CHUNKS) + tile_chunk<CHUNKS>(row, chunk)] =
                    reinterpret_cast<const uint4*>(fresh)[lane];
            }
            __syncwarp();
        }

        float logits[FOURS][4];
#pragma unroll
        for (int n = 0; n < FOURS; ++n) logits[n][0] = logits[n][1] = logits[n][2] = logits[n][3] = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 2) {
            uint32_t word[4], a[4];
            load_chunks<CHUNKS, false>(word, keys, c);
#pragma unroll
            for (int i = c; i < min(c + 2, CHUNKS); ++i) {
                key_operand(a, word + 2 * (i - c), grids.k_zero);
#pragma unroll
                for (int n = 0; n < FOURS; ++n) {
                    const uint2 b = DECODE ? operand[DECODE ? i : 0] : pairs[columns[n] + i * 32];
                    mma_f16(logits[n], a, b.x, b.y);
                }
            }
        }

        if (p.dtype == DType::f32) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c += 2) {
                uint32_t word[4], a[4];
                load_chunks<CHUNKS, false>(word, keys, c);
#pragma unroll
                for (int i = c; i < min(c + 2, CHUNKS); ++i) {
                    key_operand(a, word + 2 * (i - c), grids.k_zero);
#pragma unroll
                    for (int n = 0; n < FOURS; ++n) {
                        const int query = min(4 * n + (g >> 1), count - 1);
                        const uint2 b = g % 2 ? make_uint2(0, 0) : queries.rest[query / 4][i][query % 4][t];
                        mma_f16(logits[n], a, b.x, b.y);
                    }
                }
            }
        }

        float x[FOURS][2];
        bool grows = false;
#pragma unroll
        for (int n = 0; n < FOURS; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float dot = (logits[n][2 * h] + logits[n][2 * h + 1]) * unit[n];
                x[n][h] = __fmaf_rn(dot, grids.k_step[h], dot * grids.k_rest[h]);
            }
        }
        if (start + SLOT_TILE > full_end) {  // some query does not see all slots
#pragma unroll
            for (int n = 0; n < FOURS; ++n) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (start + g + 8 * h >= end[n]) x[n][h] = HIDDEN;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < FOURS; ++n) grows = grows || fmaxf(x[n][0], x[n][1]) > top[n] + SLACK;
        if (__any_sync(FULL_WARP, grows)) {
#pragma unroll
            for (int n = 0; n < FOURS; ++n) {
                float most = fmaxf(x[n][0], x[n][1]);
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2) {
                    most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, offset));
                }
                const float higher = fmaxf(top[n], most), fade = exp2_fast(top[n] - higher);
                top[n] = higher;
                weight[n] *= fade;
                scale_sums(n, fade);
            }
        }

        uint32_t shares[FOURS][2];
#pragma unroll
        for (int n = 0; n < FOURS; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float share = exp2_fast(x[n][h] - top[n]);
                weight[n] += share;
                const float y = share * grids.v_step[h];
                const float high = eleven_bits(y);
                shares[n][h] = transpose(narrow_f16(high, y - high));
            }
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 2) {
            uint32_t word[4], a[4];
            load_chunks<CHUNKS, true>(word, values, c);
#pragma unroll
            for (int i = c; i < min(c + 2, CHUNKS); ++i) {
                value_operand(a, word + 2 * (i - c), grids.v_zero);
#pragma unroll
                for (int n = 0; n < FOURS; ++n) mma_f16(sums[n][i], a, shares[n][0], shares[n][1]);
            }
        }
        __syncwarp();
        ring.copy(stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // Every warp leaves its triples; rings are not in use any more.
    wait_copies<0>();
    __syncthreads();
    const WarpTriples<CHUNKS, FOURS> triples(rings, warps);
#pragma unroll
    for (int n = 0; n < FOURS; ++n) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) weight[n] += __shfl_xor_sync(FULL_WARP, weight[n], offset);
        const int row = warp * QUERIES + 4 * n + t;
        float* const target = triples.sums + row * SHAPE.pitch() + 2 * g;
        const float v_unit = grids.v_unit * (1.0f / UNIT);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            *reinterpret_cast<float2*>(target + 16 * c) =
                make_float2((sums[n][c][0] + sums[n][c][1]) * v_unit, (sums[n][c][2] + sums[n][c][3]) * v_unit);
        }
        if (g == 0) {
            triples.tops[row] = top[n];
            triples.weights[row] = weight[n];
        }
    }
    __syncthreads();
    const int64_t tile = static_cast<int64_t>(pair) * gridDim.y + blockIdx.y;
    finish(p, triples, queries, warps, count, static_cast<int64_t>(batch) * p.period + first_query, head, tile);
}

}  // namespace ptq::cuda
