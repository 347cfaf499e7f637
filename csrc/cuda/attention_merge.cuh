// After the loop of an attention kernel. What a warp found of a query is a triple (top, weight, sums): of the slots it
// has seen, with logits x in base 2,
//
//     top >= max x - SLACK     weight = sum 2^(x - top)     sums[d] = sum 2^(x - top) v^[d]
//
// Triples of disjoint slots merge in any order; the output is sums / weight. Warps of a block merge in shared memory,
// blocks that share the slots of a query in the workspace, in the order of their numbers: the result does not depend on
// who comes last.
#pragma once

#include "attention_queries.cuh"
#include "handover.cuh"

namespace ptq::cuda {

// In place of minus infinity, so that differences stay finite: the logit of a hidden slot, and the top of a query that
// has seen none. 2^(HIDDEN - NOTHING_SEEN) is 0, and so is 2^(NOTHING_SEEN - top) for every top that a slot gave.
constexpr float HIDDEN = -1.0e30f, NOTHING_SEEN = -5.0e29f;

// Eight columns of a query, merged.
struct Merged {
    float top, weight, sums[OCTET];
};

// Triple i of `count`: top_of(i), weight_of(i), and as two float4 sums_of(i, 0) and sums_of(i, 1). Not unrolled: loops
// are short, code is read from memory once per launch.
template <typename Tops, typename Weights, typename Sums>
__device__ __forceinline__ Merged merge(int count, const Tops& top_of, const Weights& weight_of, const Sums& sums_of) {
    Merged m = {NOTHING_SEEN, 0.0f, {}};
#pragma unroll 1
    for (int i = 0; i < count; ++i) m.top = fmaxf(m.top, top_of(i));
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const float factor = exp2_fast(top_of(i) - m.top);
        m.weight = __fmaf_rn(weight_of(i), factor, m.weight);
        const float4 a = sums_of(i, 0), b = sums_of(i, 1);
        const float part[OCTET] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int d = 0; d < OCTET; ++d) m.sums[d] = __fmaf_rn(part[d], factor, m.sums[d]);
    }
    return m;
}

// sums / weight of a query, rounded to the dtype of the stream; as codes of that rounded value if there is a table.
// By all lanes of a warp, `lanes` per query; `exists`: this lane has something to store.
__device__ __forceinline__ void emit(const AttentionParams& p, const Merged& m, const Grid& grid, int64_t row,
                                     uint32_t head, int octet, int lanes, bool exists) {
    const int column = OCTET * octet, count = exists ? p.head_dim - column : 0;
    const int64_t target =
        row * (static_cast<int64_t>(p.heads) * p.head_dim) + static_cast<int64_t>(head) * p.head_dim + column;
    const float share = __frcp_rn(m.weight);
    float y[OCTET];
#pragma unroll
    for (int d = 0; d < OCTET; ++d) y[d] = m.sums[d] * share;
    if (!p.out_table) {
        if (count > 0) store_octet(at(p.out, p.dtype, target), p.dtype, count, y);
        return;
    }
    widen(narrow(p.dtype, y), p.dtype, y);
    uint32_t codes[2];
    to_codes(Quantizer(grid), y, codes);
    clear_codes(codes, count);
    store_code_octet(static_cast<int8_t*>(p.out) + target, count, codes);
    if (p.sums) {
        const int32_t sum = group_sum(add_codes(codes[0], add_codes(codes[1], 0)), lanes);
        if (octet == 0 && exists) atomicAdd(p.sums + row, sum);
    }
}

// Where the warps of a block leave their triples: [warp][query] of each.
template <int CHUNKS, int FOURS>
struct WarpTriples {
    static constexpr AttentionShape SHAPE{CHUNKS, FOURS, 1};
    static constexpr int QUERIES = SHAPE.queries(), PITCH = SHAPE.pitch();

    float *sums, *tops, *weights;

    __device__ __forceinline__ WarpTriples(void* shared, int warps)
        : sums(static_cast<float*>(shared)), tops(sums + warps * QUERIES * PITCH), weights(tops + warps * QUERIES) {}
};

// Merges what `warps` warps left and emits `count` queries of the pair, the first being row `row` of the output.
// `tile`: number of this tile of queries.
template <int CHUNKS, int FOURS>
__device__ __forceinline__ void finish(const AttentionParams& p, const WarpTriples<CHUNKS, FOURS>& warp_triples,
                                       Queries<CHUNKS, FOURS>& queries, int warps, int count, int64_t row,
                                       uint32_t head, int64_t tile) {
    using Triples = WarpTriples<CHUNKS, FOURS>;
    constexpr int GROUP = octet_lanes<CHUNKS>(), COLUMNS = 16 * CHUNKS, QUERIES = Triples::QUERIES;
    const int thread = static_cast<int>(threadIdx.x), octet = thread % GROUP;
    const int step = static_cast<int>(blockDim.x) / GROUP, splits = static_cast<int>(gridDim.z);
    const auto of_warps = [&](int j) {
        return merge(
            warps, [&](int w) { return warp_triples.tops[w * QUERIES + j]; },
            [&](int w) { return warp_triples.weights[w * QUERIES + j]; },
            [&](int w, int half) {
                const float* sums = warp_triples.sums + (w * QUERIES + j) * Triples::PITCH + OCTET * octet;
                return reinterpret_cast<const float4*>(sums)[half];
            });
    };

    constexpr int PART = Triples::SHAPE.part_floats();
    float* const parts = p.workspace + tile * splits * PART;
    float* const mine = parts + blockIdx.z * PART;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += step) {
        const int j = begin + thread / GROUP;
        const bool exists = j < count && octet < 2 * CHUNKS;
        if (!__any_sync(FULL_WARP, exists)) break;
        const Merged m = exists ? of_warps(j) : Merged{0.0f, 1.0f, {}};
        if (splits == 1) {
            emit(p, m, queries.grids[min(j, count - 1)], row + j, head, octet, GROUP, exists);
        } else if (exists) {
            float4* const sums = reinterpret_cast<float4*>(mine + j * COLUMNS + OCTET * octet);
            sums[0] = make_float4(m.sums[0], m.sums[1], m.sums[2], m.sums[3]);
            sums[1] = make_float4(m.sums[4], m.sums[5], m.sums[6], m.sums[7]);
            if (octet == 0) {
                mine[QUERIES * COLUMNS + j] = m.top;
                mine[QUERIES * COLUMNS + QUERIES + j] = m.weight;
            }
        }
    }
    if (splits == 1 || !arrive_last(p.counters + tile, static_cast<unsigned int>(splits), &queries.flag)) return;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += step) {
        const int j = begin + thread / GROUP;
        const bool exists = j < count && octet < 2 * CHUNKS;
        if (!__any_sync(FULL_WARP, exists)) break;
        const float* const first = parts + QUERIES * COLUMNS + j;
        const auto of_splits = [&]() {
            return merge(
                splits, [&](int i) { return __ldcg(first + i * PART); },
                [&](int i) { return __ldcg(first + i * PART + QUERIES); },
                [&](int i, int half) {
                    const float* sums = parts + i * PART + j * COLUMNS + OCTET * octet;
                    return __ldcg(reinterpret_cast<const float4*>(sums) + half);
                });
        };
        const Merged m = exists ? of_splits() : Merged{0.0f, 1.0f, {}};
        emit(p, m, queries.grids[min(j, count - 1)], row + j, head, octet, GROUP, exists);
    }
}

}  // namespace ptq::cuda
