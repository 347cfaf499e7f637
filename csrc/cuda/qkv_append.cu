// qkv_append: q, k, v = split(qkv); q, k = kind(q, k); cache[position] = Q(k), Q(v); q is written out.
//
// A group of lanes per token and head, eight neighbouring values per lane: 1, 2, 4, ... 32 lanes, as many as cover the
// cached vector with its padding. A position without a slot writes nothing to the caches.
#include "heads.cuh"
#include "rows.h"

namespace ptq::cuda {
namespace {

// Codes on the 8-bit grid of a group and head; zeros in the padding.
__device__ __forceinline__ void append(int8_t* cached, const float2& grid, const float (&v)[OCTET], int first,
                                       int count, int lanes) {
    uint32_t codes[2];
    head_codes(grid.x, grid.y, v, count, codes);
    store_code_octet(cached + first, lanes - first, codes);
}

// (recip, zq) of a table row, read by the first lane of a group and handed to the others.
__device__ __forceinline__ float2 shared_grid(const Grid* row, bool first_lane, int group) {
    float2 grid = {0.0f, 0.0f};
    if (first_lane) grid = {row->recip, row->zq};
    return {__shfl_sync(FULL_WARP, grid.x, 0, group), __shfl_sync(FULL_WARP, grid.y, 0, group)};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(APPEND_THREADS) qkv_append(const __grid_constant__ AppendParams p) {
    int shift = 0;
    while (OCTET << shift < p.lanes) ++shift;
    const int group = 1 << shift, lane = static_cast<int>(threadIdx.x) & (group - 1);
    const bool leader = lane == 0;
    const uint32_t asked = blockIdx.x * (blockDim.x >> shift) + (threadIdx.x >> shift);
    const bool exists = asked < p.items;
    // Idle groups follow the last item, so that all lanes of a warp take part in shuffles; they store nothing.
    const uint32_t item = exists ? asked : static_cast<uint32_t>(p.items) - 1;
    const uint32_t token = item / p.heads, head = item - token * p.heads;
    const uint32_t batch = token / p.period, i = token - batch * p.period;

    const PositionLoad asked_position(p.positions, p.wide, i, leader);
    const int first = lane * OCTET, count = p.head_dim - first;
    const int64_t column = static_cast<int64_t>(head) * p.head_dim + first,
                  third = static_cast<int64_t>(p.heads) * p.head_dim;
    const void* row = at(p.qkv, p.dtype, token * 3 * third + column);
    const Raw<OCTET> q_raw = fetch_octet<Aligned::quads>(row, p.dtype, count);
    const Raw<OCTET> k_raw = fetch_octet<Aligned::quads>(at(row, p.dtype, third), p.dtype, count);
    const Raw<OCTET> v_raw = fetch_octet<Aligned::quads>(at(row, p.dtype, 2 * third), p.dtype, count);

    int64_t position = 0;
    int kv_group = 0;
    if (leader) {
        position = asked_position.value();
        kv_group = static_cast<int>(pick(p.kv_group, clamp_index(position, p.slots), p.groups));
    }
    position = __shfl_sync(FULL_WARP, position, 0, group);
    const int64_t slot = clamp_index(position, p.slots);
    HeadVectors vectors;
    vectors.fetch_for(p, head, slot, first, count);
    const int64_t table_row = static_cast<int64_t>(kv_group) * p.heads + head;
    const float2 k_grid = shared_grid(p.k_table + table_row, leader, group);
    const float2 v_grid = shared_grid(p.v_table + table_row, leader, group);

    float q[OCTET], k[OCTET], v[OCTET];
    widen(q_raw, p.dtype, q);
    widen(k_raw, p.dtype, k);
    widen(v_raw, p.dtype, v);
    vectors.apply(p, q, k, count, group);
    if (!exists) return;

    const int64_t out = ((static_cast<int64_t>(batch) * p.heads + head) * p.period + i) * p.head_dim + first;
    store_octet(at(p.q, p.dtype, out), p.dtype, count, q);
    if (position != slot) return;
    append(p.k_cache + batch * p.k.batch + head * p.k.head + slot * p.lanes, k_grid, k, first, count, p.lanes);
    append(p.v_cache + batch * p.v.batch + head * p.v.head + slot * p.lanes, v_grid, v, first, count, p.lanes);
}

Kernel qkv_append_kernel() {
    return {"qkv_append", reinterpret_cast<const void*>(qkv_append)};
}

}  // namespace ptq::cuda
