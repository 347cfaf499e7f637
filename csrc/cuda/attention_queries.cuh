// Before the loop of an attention kernel: queries become operands of the matrix instruction, and the new key and value
// of a decode step become codes.
#pragma once

#include "attention_mma.cuh"
#include "attention_tile.h"
#include "heads.cuh"

namespace ptq::cuda {

// Lanes that hold a vector of 16 * CHUNKS values in eights.
template <int CHUNKS>
__device__ __forceinline__ constexpr int octet_lanes() {
    return CHUNKS <= 4 ? 8 : CHUNKS <= 8 ? 16 : 32;
}

// The queries of a block, as operand b of mma_f16: 16 values of a head (k) times eight columns. A query is two columns,
// a number the sum of two halves:
//
//     x * 2^s = high + low + rest      each what is left, rounded to 11 bits; |x| 2^s < 2^14
//
// with one s per query. A number of a half type is the high half alone, and all three are a float32, without loss. The
// rest has an operand of its own, which only float32 needs; its odd columns are 0.
//
//     column      0             1            2            3        ...  7
//     holds       query 0 high  query 0 low  query 1 high ...           query 3 low
//
// The k of an operand are permuted as load_bytes delivers keys: with bytes 0, 2 of a lane's word in one register and 1,
// 3 in the other, k 2t, 2t + 1, 2t + 8, 2t + 9 are values 4t, 4t + 2, 4t + 1, 4t + 3 of a chunk.
//
//     pairs[four][chunk][column][t]: values (4t, 4t + 2) and (4t + 1, 4t + 3)
template <int CHUNKS, int FOURS>
struct alignas(16) Queries {
    uint2 pairs[FOURS][CHUNKS][8][4];
    uint2 rest[FOURS][CHUNKS][4][4];  // of the even columns
    float units[4 * FOURS];           // 2^-s
    Grid grids[4 * FOURS];            // of the output
    Grid slots[2][2];                 // of keys and values, by group, unless there is a table of groups
    unsigned int flag;

    // Eight values of query j, from 8 * octet on; by all lanes of a warp, octet_lanes() of them per query. whole:
    // float32.
    __device__ __forceinline__ void store(int j, int octet, const float (&v)[OCTET], bool exists, bool whole) {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < OCTET; ++i) most = fmaxf(most, fabsf(v[i]));
#pragma unroll
        for (int offset = octet_lanes<CHUNKS>() / 2; offset > 0; offset >>= 1) {
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, offset));
        }
        // most < 2^(e - 126) for the exponent field e; both powers below are normal numbers.
        const uint32_t e = max(__float_as_uint(most) >> 23, 14u);
        const float scale = __uint_as_float((267u - e) << 23), back = __uint_as_float((e - 13u) << 23);
        float high[OCTET], low[OCTET], last[OCTET];
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            const float x = v[i] * scale;
            high[i] = eleven_bits(x);
            low[i] = eleven_bits(x - high[i]);
            last[i] = (x - high[i]) - low[i];
        }
        if (!exists || octet >= 2 * CHUNKS) return;
        store_half(pairs[j / 4][octet / 2][2 * (j % 4)] + 2 * (octet % 2), high);
        store_half(pairs[j / 4][octet / 2][2 * (j % 4) + 1] + 2 * (octet % 2), low);
        if (whole) store_half(rest[j / 4][octet / 2][j % 4] + 2 * (octet % 2), last);
        if (octet == 0) units[j] = back;
    }

  private:
    static __device__ __forceinline__ void store_half(uint2* target, const float (&v)[OCTET]) {
        *reinterpret_cast<uint4*>(target) =
            make_uint4(narrow_f16(v[0], v[2]), narrow_f16(v[1], v[3]), narrow_f16(v[4], v[6]), narrow_f16(v[5], v[7]));
    }
};

// Queries that lie in memory as [B, H, P, d]: `count` of one sequence and head, the first at `first`.
template <int CHUNKS, int FOURS>
__device__ __forceinline__ void load_queries(const AttentionParams& p, int64_t first, int count,
                                             Queries<CHUNKS, FOURS>& queries) {
    constexpr int GROUP = octet_lanes<CHUNKS>();
    const int thread = static_cast<int>(threadIdx.x), octet = thread % GROUP, column = OCTET * octet;
    const int step = static_cast<int>(blockDim.x) / GROUP;
    for (int begin = 0; begin < count; begin += step) {
        const int j = begin + thread / GROUP;
        float v[OCTET];
        load_octet<Aligned::quads>(at(p.q, p.dtype, (first + j) * p.head_dim + column), p.dtype,
                                   j < count ? p.head_dim - column : 0, v);
        queries.store(j, octet, v, j < count, p.dtype == DType::f32);
    }
}

// The group of a slot, clamped to those there are.
__device__ __forceinline__ int slot_group(const AttentionParams& p, int64_t slot) {
    if (p.grouping == Grouping::one) return 0;
    if (p.grouping == Grouping::step) return slot < p.edge ? 0 : 1;
    return static_cast<int>(clamp_index(p.kv_group[slot], p.groups));
}

// Grids of keys and values, read once per block by the first warp: lane 2 * group + which (0: keys, 1: values) has one.
// With a table of groups only that of `slot`, which a new token needs (if `wanted`).
struct FirstGrids {
    Grid grid = {};
    int group = 0;  // of the slot
    bool by_group;

    __device__ __forceinline__ FirstGrids(const AttentionParams& p, uint32_t head, int64_t slot, bool wanted)
        : by_group(p.grouping != Grouping::table) {
        const int lane = static_cast<int>(threadIdx.x) & 31, groups = p.grouping == Grouping::step ? 2 : 1;
        if (wanted) group = slot_group(p, slot);
        if (lane >= 2 * groups || !(by_group || wanted)) return;
        const Grid* table = lane % 2 ? p.v_table : p.k_table;
        grid = load_grid(table + static_cast<int64_t>(by_group ? lane / 2 : group) * p.heads + head);
    }

    template <int CHUNKS, int FOURS>
    __device__ __forceinline__ void store(Queries<CHUNKS, FOURS>& queries) const {
        const int lane = static_cast<int>(threadIdx.x) & 31;
        if (lane < 4) queries.slots[lane % 2][lane / 2] = grid;
    }

    // (recip, zq) of the slot; by all lanes of the warp.
    __device__ __forceinline__ float2 of_slot(int which) const {
        const int lane = by_group ? 2 * group + which : which;
        return {__shfl_sync(FULL_WARP, grid.recip, lane), __shfl_sync(FULL_WARP, grid.zq, lane)};
    }
};

// A decode step: one token per sequence, by one warp. What was loaded before other loads start, and what becomes of it.
template <int CHUNKS>
struct NewToken {
    static constexpr int GROUP = octet_lanes<CHUNKS>();

    Raw<OCTET> q_raw, k_raw, v_raw;
    HeadVectors vectors;
    int octet, count;

    // `slot` is in range; `owner`: this block writes the key and the value.
    __device__ __forceinline__ NewToken(const AttentionParams& p, uint32_t batch, uint32_t head, int64_t slot,
                                        bool owner) {
        const int lane = static_cast<int>(threadIdx.x) & 31, column = OCTET * lane;
        octet = lane % GROUP;
        count = lane < GROUP ? p.head_dim - column : 0;  // one group of lanes has the vectors
        const int64_t third = static_cast<int64_t>(p.heads) * p.head_dim;
        const void* q = at(p.q, p.dtype, batch * 3 * third + static_cast<int64_t>(head) * p.head_dim + column);
        q_raw = fetch_octet<Aligned::quads>(q, p.dtype, count);
        k_raw = fetch_octet<Aligned::quads>(at(q, p.dtype, third), p.dtype, owner ? count : 0);
        v_raw = fetch_octet<Aligned::quads>(at(q, p.dtype, 2 * third), p.dtype, owner ? count : 0);
        vectors.fetch_for(p, head, slot, column, count);
    }

    // q, rounded to its dtype, goes to the queries. The owner's codes go to `fresh` [k, v][16 * CHUNKS bytes] and, if
    // `has_slot`, to the caches at k_slot and v_slot.
    template <int FOURS>
    __device__ __forceinline__ void prepare(const AttentionParams& p, Queries<CHUNKS, FOURS>& queries,
                                            const FirstGrids& grids, uint2* fresh, bool owner, bool has_slot,
                                            int8_t* k_slot, int8_t* v_slot) {
        float q[OCTET], k[OCTET], v[OCTET];
        widen(q_raw, p.dtype, q);
        widen(k_raw, p.dtype, k);
        widen(v_raw, p.dtype, v);
        vectors.apply(p, q, k, count, GROUP);
        widen(narrow(p.dtype, q), p.dtype, q);
        queries.store(0, octet, q, (threadIdx.x & 31) < GROUP, p.dtype == DType::f32);
        const float2 k_grid = grids.of_slot(0), v_grid = grids.of_slot(1);
        if (!owner || (threadIdx.x & 31) >= GROUP || octet >= 2 * CHUNKS) return;
        uint32_t k_codes[2], v_codes[2];
        head_codes(k_grid.x, k_grid.y, k, count, k_codes);
        head_codes(v_grid.x, v_grid.y, v, count, v_codes);
        fresh[octet] = make_uint2(k_codes[0], k_codes[1]);
        fresh[2 * CHUNKS + octet] = make_uint2(v_codes[0], v_codes[1]);
        if (has_slot && OCTET * octet < p.lanes) {
            store_words<2>(k_slot + OCTET * octet, k_codes);
            store_words<2>(v_slot + OCTET * octet, v_codes);
        }
    }
};

}  // namespace ptq::cuda
