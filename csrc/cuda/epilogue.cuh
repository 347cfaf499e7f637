// What becomes of the exact sums of a GEMM: one mechanism, the output is a template parameter, everything else is the
// same for all threads of a launch.
//
// Symbols: i row (grid of its position: delta_i, zq_i), j channel, acc the exact integer product, s_j the weight scale,
// C_j the sum of the weight codes, b_j the bias. float32, one rounding per operation, in the order written.
//
//     y_ij = (delta_i s_j) float(acc_ij - zq_i C_j) + b_j
//
//     store:          out = activation(y)
//     quant:          out = Q_i(activation(y)), the code in the output grid of the row's position (Quantizer)
//                     paired: out = Q_i(silu(y1) y3), y1 and y3 neighbours
//     gate_residual:  out = residual + gate_r y, r the row's condition; residual + y without gate
#pragma once

#include "activation.cuh"
#include "gemm_tile.h"
#include "octets.cuh"

namespace ptq::cuda {

constexpr int QUAD = 4;  // channels of a lane

// Constants of the CHANNELS channels of a tile, in shared memory: asked for once, before the main loop.
template <int CHANNELS>
struct ChannelTable {
    float scale[CHANNELS], bias[CHANNELS];
    int32_t col_sums[CHANNELS];

    __device__ __forceinline__ void load(const GemmParams& p, int first) {
        const uint32_t i = threadIdx.x, n = first + i;
        if (i >= CHANNELS) return;
        float s = 0.0f, b = 0.0f;
        int32_t c = 0;
        if (n < static_cast<uint32_t>(p.channels)) {
            const uint32_t j = p.paired ? n % 2 * (p.channels / 2) + n / 2 : n;
            s = p.scale[j];
            c = p.col_sums[j];
            if (p.bias) b = p.bias[j];
        }
        scale[i] = s;
        col_sums[i] = c;
        bias[i] = b;
    }
};

// A lane's four channels, from `first` on; count: how many of them exist, may be 0 or less.
struct Channels {
    int first, count;
    float scale[QUAD], bias[QUAD];
    int32_t col_sums[QUAD];

    template <int CHANNELS>
    __device__ __forceinline__ Channels(const GemmParams& p, const ChannelTable<CHANNELS>& table, int tile, int inside)
        : first(tile + inside), count(p.channels - first) {
        load_words<QUAD>(table.scale + inside, reinterpret_cast<uint32_t*>(scale));
        load_words<QUAD>(table.bias + inside, reinterpret_cast<uint32_t*>(bias));
        load_words<QUAD>(table.col_sums + inside, reinterpret_cast<uint32_t*>(col_sums));
    }
};

// y of one row. A bias of 0 is not added: -0 would become 0.
__device__ __forceinline__ void dequantize(const GemmParams& p, const Channels& c, const Grid& grid, const int4& acc,
                                           float (&y)[QUAD]) {
    const int32_t zq = static_cast<int32_t>(grid.zq);
    const int32_t sum[QUAD] = {acc.x, acc.y, acc.z, acc.w};
#pragma unroll
    for (int i = 0; i < QUAD; ++i) y[i] = (grid.delta * c.scale[i]) * static_cast<float>(sum[i] - zq * c.col_sums[i]);
    if (p.bias) {
#pragma unroll
        for (int i = 0; i < QUAD; ++i) y[i] = y[i] + c.bias[i];
    }
}

// Whether a lane's quads of every row can be read and written at once.
__device__ __forceinline__ bool whole_quads(const void* p, DType dtype, int64_t stride, int count) {
    return count >= QUAD && stride % QUAD == 0 && reinterpret_cast<uintptr_t>(p) % (QUAD * dtype_size(dtype)) == 0;
}
__device__ __forceinline__ Raw<QUAD> fetch_quad(const void* p, DType dtype, int64_t i, int count, bool whole) {
    if (whole) return fetch<QUAD>(at(p, dtype, i), dtype);
    return fetch_some<QUAD>(at(p, dtype, i), dtype, count);
}
__device__ __forceinline__ void store_quad(void* p, DType dtype, int64_t i, int count, bool whole,
                                           const float (&v)[QUAD]) {
    if (whole) {
        store_floats(at(p, dtype, i), dtype, v);
    } else {
        store_floats_some(at(p, dtype, i), dtype, count, v);
    }
}

// The rows of a lane, COUNT at a time: everything is asked for before the first use. grids: input grid and output grid
// of the tile's rows, alternating. `local` counts rows from the tile's first one; of them there are `exist`.
// ACTIVATE: whether there is an activation. It is known before the first row, and without one nothing is asked per row.
template <Output OUTPUT, bool ACTIVATE>
struct Epilogue;

template <bool ACTIVATE>
struct Epilogue<Output::store, ACTIVATE> {
    const GemmParams& p;
    const Channels& c;
    const bool whole;

    __device__ __forceinline__ Epilogue(const GemmParams& p, const Channels& c)
        : p(p), c(c), whole(whole_quads(p.out, p.out_dtype, p.channels, c.count)) {}

    template <int COUNT>
    __device__ __forceinline__ void rows(const Grid* grids, int64_t first, int exist, const int (&local)[COUNT],
                                         const int4 (&acc)[COUNT]) const {
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            if (local[u] >= exist) continue;
            const int64_t row = first + local[u];
            float y[QUAD];
            dequantize(p, c, grids[2 * local[u]], acc[u], y);
            if constexpr (ACTIVATE) activate(p.activation, y);
            store_quad(p.out, p.out_dtype, row * p.channels + c.first, c.count, whole, y);
        }
    }
};

template <bool ACTIVATE>
struct Epilogue<Output::gate_residual, ACTIVATE> {
    const GemmParams& p;
    const Channels& c;
    const bool whole, whole_gate;

    __device__ __forceinline__ Epilogue(const GemmParams& p, const Channels& c)
        : p(p),
          c(c),
          whole(whole_quads(p.out, p.out_dtype, p.channels, c.count) &&
                whole_quads(p.residual, p.out_dtype, p.channels, c.count)),
          whole_gate(whole_quads(p.gate, p.gate_dtype, p.gate_stride, c.count)) {}

    template <int COUNT>
    __device__ __forceinline__ void rows(const Grid* grids, int64_t first, int exist, const int (&local)[COUNT],
                                         const int4 (&acc)[COUNT]) const {
        Raw<QUAD> residual[COUNT], gate[COUNT];
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            if (local[u] >= exist) continue;
            const int64_t row = first + local[u];
            residual[u] = fetch_quad(p.residual, p.out_dtype, row * p.channels + c.first, c.count, whole);
            if (p.gate) {
                const int64_t from = pick(p.gate_rows, row, p.gate_count) * p.gate_stride;
                gate[u] = fetch_quad(p.gate, p.gate_dtype, from + c.first, c.count, whole_gate);
            }
        }
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            if (local[u] >= exist) continue;
            const int64_t row = first + local[u];
            float y[QUAD], v[QUAD];
            dequantize(p, c, grids[2 * local[u]], acc[u], y);
            if (p.gate) {
                widen(gate[u], p.gate_dtype, v);
#pragma unroll
                for (int i = 0; i < QUAD; ++i) y[i] = v[i] * y[i];
            }
            widen(residual[u], p.out_dtype, v);
#pragma unroll
            for (int i = 0; i < QUAD; ++i) y[i] = v[i] + y[i];
            store_quad(p.out, p.out_dtype, row * p.channels + c.first, c.count, whole, y);
        }
    }
};

template <bool ACTIVATE>
struct Epilogue<Output::quant, ACTIVATE> {
    const GemmParams& p;
    const Channels& c;
    const int width, first_out, count;  // channels of a row of codes; of them, the lane's
    const bool whole;

    __device__ __forceinline__ Epilogue(const GemmParams& p, const Channels& c)
        : p(p),
          c(c),
          width(p.paired ? p.channels / 2 : p.channels),
          first_out(p.paired ? c.first / 2 : c.first),
          count(p.paired ? c.count / 2 : c.count),
          whole(count >= (p.paired ? 2 : QUAD) && width % QUAD == 0 && reinterpret_cast<uintptr_t>(p.out) % QUAD == 0) {
    }

    template <int COUNT>
    __device__ __forceinline__ void rows(const Grid* grids, int64_t first, int exist, const int (&local)[COUNT],
                                         const int4 (&acc)[COUNT]) const {
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            const int64_t row = first + local[u];
            float y[QUAD];
            dequantize(p, c, grids[2 * local[u]], acc[u], y);
            if (p.paired) {
                y[0] = silu(y[0]) * y[1];
                y[1] = silu(y[2]) * y[3];
                y[2] = y[3] = 0.0f;
            } else if constexpr (ACTIVATE) {
                activate(p.activation, y);
            }
            uint32_t codes[1];
            to_codes(Quantizer(grids[2 * local[u] + 1]), y, codes);
            int32_t sum = 0;
            const bool exists = local[u] < exist;
            if (exists) sum = write(row, codes[0]);
            if (p.sums) add_to_row(row, exists, sum);
        }
    }

  private:
    // The sum of what was written.
    __device__ __forceinline__ int32_t write(int64_t row, uint32_t codes) const {
        int8_t* out = static_cast<int8_t*>(p.out) + row * width + first_out;
        const int most = p.paired ? 2 : QUAD;
        if (count < most) codes = count > 0 ? codes & ((1u << 8 * count) - 1) : 0;
        if (p.paired) codes &= 0xFFFFu;
        if (whole) {
            if (p.paired) {
                *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(codes);
            } else {
                *reinterpret_cast<uint32_t*>(out) = codes;
            }
        } else {
#pragma unroll
            for (int i = 0; i < QUAD; ++i) {
                if (i < count && i < most) out[i] = static_cast<int8_t>(codes >> 8 * i);
            }
        }
        return add_codes(codes, 0);
    }
    // Eight lanes hold the same row, four apart.
    __device__ __forceinline__ void add_to_row(int64_t row, bool exists, int32_t sum) const {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
        if (threadIdx.x % 32 < 4 && exists) atomicAdd(p.sums + row, sum);
    }
};

}  // namespace ptq::cuda
