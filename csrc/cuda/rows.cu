// quantize and adaln_quant: one thread block per row, the row in registers, one pass over memory.
#include "activation.cuh"
#include "norm.cuh"
#include "rows.h"

namespace ptq::cuda {
namespace {

// Sum over the thread block of a sum per lane; `total` is shared and was 0 at the last barrier. Thread 0 gets it.
__device__ __forceinline__ int32_t block_sum(int32_t sum, int32_t* total) {
    sum = __reduce_add_sync(FULL_WARP, sum);
    if (threadIdx.x % 32 == 0) atomicAdd(total, sum);
    __syncthreads();
    return *total;
}

// A warp holds segments warp, warp + warps, ... in registers. With one of them, everything is on its way before the
// barrier; with more, what is applied to the row is asked for afterwards, which saves registers.
template <int HELD>
__device__ __forceinline__ void adaln_quant_row(const AdalnParams& p) {
    __shared__ Moments moments[MAX_ROW_WIDTH / SEGMENT];
    __shared__ Grid grid;
    __shared__ int32_t total;

    constexpr bool PREFETCH = HELD == 1;
    const NormPointers& in = p.in;
    const NormSettings& norm = p.norm;
    const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
    const int warps = static_cast<int>(blockDim.x) >> 5;
    const int64_t row = blockIdx.x;
    const bool first = threadIdx.x == 0;
    const auto column_of = [&](int h) { return (warp + warps * h) * SEGMENT + lane * OCTET; };

    // Loads, and nothing that waits for one before all that can start have started. What a warp or the block has in
    // common is read by one thread.
    const PositionLoad position(p.positions, p.grids.wide, first ? blockIdx.x % p.grids.period : 0, first);
    int32_t index = 0;
    if (in.mod_rows && lane == 0) index = in.mod_rows[row];
    Raw<OCTET> raw[HELD];
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const int column = column_of(h);
        raw[h] = fetch_octet(at(in.x, norm.x_dtype, row * norm.x_stride + column), norm.x_dtype, norm.width - column);
    }
    Grid loaded;
    if (first) loaded = load_grid(p.table + clamp_index(position.value(), p.grids.length));
    int64_t mod_row = row;
    if (in.mod_rows) mod_row = clamp_index(__shfl_sync(FULL_WARP, index, 0), norm.mod_count);
    Affine affine;
    if constexpr (PREFETCH) {
        affine = fetch_affine<Aligned::unknown>(in, norm, mod_row, column_of(0), norm.width - column_of(0));
    }
    if (first) {
        grid = loaded;
        total = 0;
    }

    float x[HELD][OCTET];
    int count[HELD], columns[HELD];
    Moments m[HELD];
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        widen(raw[h], norm.x_dtype, x[h]);
        count[h] = norm.width - column_of(h);
        columns[h] = segment_columns(norm.width, warp + warps * h);
    }
    segment_moments(x, count, columns, norm.kind, m);
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        if (lane == 0 && columns[h] > 0) moments[warp + warps * h] = m[h];
    }
    __syncthreads();

    const RowNorm row_norm = join_moments(moments, norm.width, norm.kind, norm.eps);
    const Quantizer quantizer(grid);
    int32_t sum = 0;
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const int column = column_of(h);
        if (columns[h] <= 0) continue;
        if constexpr (!PREFETCH) affine = fetch_affine<Aligned::unknown>(in, norm, mod_row, column, count[h]);
        normalise(x[h], row_norm, affine, in, norm);
        uint32_t codes[2];
        to_codes(quantizer, x[h], codes);
        clear_codes(codes, count[h]);
        store_code_octet(p.codes + row * norm.width + column, count[h], codes);
        sum = add_codes(codes[0], add_codes(codes[1], sum));
    }
    if (p.sums) {
        sum = block_sum(sum, &total);
        if (first) p.sums[row] = sum;
    }
}

}  // namespace

// q = Q(act(x))
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS, 1) quantize(const __grid_constant__ QuantizeParams p) {
    __shared__ Grid grid;
    __shared__ int32_t total;

    const int64_t row = blockIdx.x;
    const bool first = threadIdx.x == 0;
    const PositionLoad position(p.positions, p.grids.wide, first ? blockIdx.x % p.grids.period : 0, first);
    const auto fetch_at = [&](int column) {
        return fetch_octet(at(p.x, p.x_dtype, row * p.x_stride + column), p.x_dtype, p.width - column);
    };
    int column = static_cast<int>(threadIdx.x) * OCTET;
    Raw<OCTET> raw = fetch_at(column);
    if (first) {
        total = 0;
        grid = load_grid(p.table + clamp_index(position.value(), p.grids.length));
    }
    __syncthreads();
    const Quantizer quantizer(grid);
    int32_t sum = 0;
    while (column < p.width) {
        const int count = p.width - column;
        float x[OCTET];
        widen(raw, p.x_dtype, x);
        activate(p.activation, x);
        uint32_t q[2];
        to_codes(quantizer, x, q);
        clear_codes(q, count);
        store_code_octet(p.codes + row * p.width + column, count, q);
        sum = add_codes(q[0], add_codes(q[1], sum));
        column += static_cast<int>(blockDim.x) * OCTET;
        raw = fetch_at(column);
    }
    if (p.sums) {
        sum = block_sum(sum, &total);
        if (threadIdx.x == 0) p.sums[row] = sum;
    }
}

// y = norm(x) * weight + bias; y = y * (offset + scale[r]) + shift[r]; q = Q(y). The number: segments of a warp.
#define ADALN_QUANT(HELD)                                           \
    extern "C" __global__ void __launch_bounds__(ADALN_THREADS, 1)  \
        adaln_quant_##HELD(const __grid_constant__ AdalnParams p) { \
        adaln_quant_row<HELD>(p);                                   \
    }
ADALN_QUANT(1)
ADALN_QUANT(2)
ADALN_QUANT(3)
#undef ADALN_QUANT

Kernel quantize_kernel() {
    return {"quantize", reinterpret_cast<const void*>(quantize)};
}

Kernel adaln_quant_kernel(int held) {
    switch (held) {
        case 1:
            return {"adaln_quant_1", reinterpret_cast<const void*>(adaln_quant_1)};
        case 2:
            return {"adaln_quant_2", reinterpret_cast<const void*>(adaln_quant_2)};
        default:
            return {"adaln_quant_3", reinterpret_cast<const void*>(adaln_quant_3)};
    }
}

}  // namespace ptq::cuda
