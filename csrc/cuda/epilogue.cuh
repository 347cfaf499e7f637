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

// Constants of a row of a tile, in shared memory: those of its input grid and of its output grid.
struct RowGrids {
    float delta;
    int32_t minus_zq;
    float unused[2];
    float4 quantizer;

    __device__ __forceinline__ void store_input(const Grid& in) {
        delta = in.delta;
        minus_zq = -static_cast<int32_t>(in.zq);
    }
    __device__ __forceinline__ void store_output(const Grid& out) {
        const Quantizer q(out);
        quantizer = make_float4(q.recip, q.zq, q.low, q.high);
    }
    __device__ __forceinline__ Quantizer output() const {
        const float4 q = quantizer;
        return Quantizer(q);
    }
};
static_assert(sizeof(RowGrids) == TileShape::ROW_BYTES, "what a plan reserves for a row");

// Constants of the CHANNELS channels of a tile, in shared memory: asked for once, before the main loop. Without biases
// they are -0, the number whose addition changes nothing: 0 would turn -0 into 0.
template <int CHANNELS>
struct ChannelTable {
    float scale[CHANNELS], bias[CHANNELS];
    int32_t col_sums[CHANNELS];

    __device__ __forceinline__ void load(const GemmParams& p, int first) {
        const uint32_t i = threadIdx.x, n = first + i;
        if (i >= CHANNELS) return;
        float s = 0.0f, b = -0.0f;
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
    float4 scale, bias;
    int4 col_sums;

    template <int CHANNELS>
    __device__ __forceinline__ Channels(const GemmParams& p, const ChannelTable<CHANNELS>& table, int tile,
                                        uint32_t inside)
        : first(tile + static_cast<int>(inside)),
          count(p.channels - first),
          scale(*reinterpret_cast<const float4*>(table.scale + inside)),
          bias(*reinterpret_cast<const float4*>(table.bias + inside)),
          col_sums(*reinterpret_cast<const int4*>(table.col_sums + inside)) {}
};

// y of one row.
__device__ __forceinline__ void dequantize(const Channels& c, const RowGrids& grid, const int4& acc, float (&y)[QUAD]) {
    const float delta = grid.delta;
    const int32_t z = grid.minus_zq;
    y[0] = (delta * c.scale.x) * static_cast<float>(acc.x + z * c.col_sums.x) + c.bias.x;
    y[1] = (delta * c.scale.y) * static_cast<float>(acc.y + z * c.col_sums.y) + c.bias.y;
    y[2] = (delta * c.scale.z) * static_cast<float>(acc.z + z * c.col_sums.z) + c.bias.z;
    y[3] = (delta * c.scale.w) * static_cast<float>(acc.w + z * c.col_sums.w) + c.bias.w;
}

// Whether a lane's quads of every row can be read and written at once.
__device__ __forceinline__ bool whole_quads(const void* p, DType dtype, int64_t stride, int count) {
    return count >= QUAD && stride % QUAD == 0 && reinterpret_cast<uintptr_t>(p) % (QUAD * dtype_size(dtype)) == 0;
}
__device__ __forceinline__ Raw<QUAD> fetch_quad(const void* p, DType dtype, int count, bool whole) {
    if (whole) return fetch<QUAD>(p, dtype);
    return fetch_some<QUAD>(p, dtype, count);
}
__device__ __forceinline__ void store_quad(void* p, DType dtype, int count, bool whole, const float (&v)[QUAD]) {
    if (whole) {
        store_floats(p, dtype, v);
    } else {
        store_floats_some(p, dtype, count, v);
    }
}

// A lane's quads of a dense operand [M, width]: an address and a distance. Rows of a tile are counted from its first
// one, so that a row's address is one instruction.
template <typename T>
struct Quads {
    T* first;        // that of the tile's first row
    uint32_t pitch;  // bytes

    __device__ __forceinline__ Quads(T* p, uint32_t element, int width, int first_row, int column)
        : first(p + (static_cast<int64_t>(first_row) * width + column) * element), pitch(width * element) {}
    __device__ __forceinline__ T* of_row(uint32_t local) const { return first + static_cast<uint64_t>(local) * pitch; }
};

// The rows of a lane, COUNT at a time: everything is asked for before the first use. `local` counts rows from the
// tile's first one; of them there are `exist`.
// ACTIVATE: whether there is an activation. It is known before the first row, and without one nothing is asked per row.
template <Output OUTPUT, bool ACTIVATE>
struct Epilogue;

template <bool ACTIVATE>
struct Epilogue<Output::store, ACTIVATE> {
    const GemmParams& p;
    const Channels& c;
    const Quads<char> out;
    const bool whole;

    __device__ __forceinline__ Epilogue(const GemmParams& p, const Channels& c, int first_row)
        : p(p),
          c(c),
          out(static_cast<char*>(p.out), dtype_size(p.out_dtype), p.channels, first_row, c.first),
          whole(whole_quads(p.out, p.out_dtype, p.channels, c.count)) {}

    template <int COUNT>
    __device__ __forceinline__ void rows(const RowGrids* grids, int exist, const uint32_t (&local)[COUNT],
                                         const int4 (&acc)[COUNT]) const {
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            if (static_cast<int>(local[u]) >= exist) continue;
            float y[QUAD];
            dequantize(c, grids[local[u]], acc[u], y);
            if constexpr (ACTIVATE) activate(p.activation, y);
            store_quad(out.of_row(local[u]), p.out_dtype, c.count, whole, y);
        }
    }
};

template <bool ACTIVATE>
struct Epilogue<Output::gate_residual, ACTIVATE> {
    const GemmParams& p;
    const Channels& c;
    const int first_row;
    const Quads<char> out;
    const Quads<const char> residual;
    const char* const gate;
    const bool whole, whole_gate;

    __device__ __forceinline__ Epilogue(const GemmParams& p, const Channels& c, int first_row)
        : p(p),
          c(c),
          first_row(first_row),
          out(static_cast<char*>(p.out), dtype_size(p.out_dtype), p.channels, first_row, c.first),
          residual(static_cast<const char*>(p.residual), dtype_size(p.out_dtype), p.channels, first_row, c.first),
          gate(p.gate ? static_cast<const char*>(at(p.gate, p.gate_dtype, c.first)) : nullptr),
          whole(whole_quads(p.out, p.out_dtype, p.channels, c.count) &&
                whole_quads(p.residual, p.out_dtype, p.channels, c.count)),
          whole_gate(whole_quads(p.gate, p.gate_dtype, p.gate_stride, c.count)) {}

    template <int COUNT>
    __device__ __forceinline__ void rows(const RowGrids* grids, int exist, const uint32_t (&local)[COUNT],
                                         const int4 (&acc)[COUNT]) const {
        Raw<QUAD> residuals[COUNT], gates[COUNT];
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            if (static_cast<int>(local[u]) >= exist) continue;
            residuals[u] = fetch_quad(residual.of_row(local[u]), p.out_dtype, c.count, whole);
            if (gate) {
                const int64_t row = pick(p.gate_rows, first_row + local[u], p.gate_count);
                gates[u] = fetch_quad(at(gate, p.gate_dtype, row * p.gate_stride), p.gate_dtype, c.count, whole_gate);
            }
        }
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            if (static_cast<int>(local[u]) >= exist) continue;
            float y[QUAD], v[QUAD];
            dequantize(c, grids[local[u]], acc[u], y);
            if (gate) {
                widen(gates[u], p.gate_dtype, v);
#pragma unroll
                for (int i = 0; i < QUAD; ++i) y[i] = v[i] * y[i];
            }
            widen(residuals[u], p.out_dtype, v);
#pragma unroll
            for (int i = 0; i < QUAD; ++i) y[i] = v[i] + y[i];
            store_quad(out.of_row(local[u]), p.out_dtype, c.count, whole, y);
        }
    }
};

template <bool ACTIVATE>
struct Epilogue<Output::quant, ACTIVATE> {
    const GemmParams& p;
    const int width, first_out, count;  // channels of a row of codes; of them, the lane's
    const Channels& c;
    const int first_row;
    const Quads<int8_t> out;
    const bool whole;

    __device__ __forceinline__ Epilogue(const GemmParams& p, const Channels& c, int first_row)
        : p(p),
          width(p.paired ? p.channels / 2 : p.channels),
          first_out(p.paired ? c.first / 2 : c.first),
          count(p.paired ? c.count / 2 : c.count),
          c(c),
          first_row(first_row),
          out(static_cast<int8_t*>(p.out), 1, width, first_row, first_out),
          whole(count >= (p.paired ? 2 : QUAD) && width % QUAD == 0 && reinterpret_cast<uintptr_t>(p.out) % QUAD == 0) {
    }

    template <int COUNT>
    __device__ __forceinline__ void rows(const RowGrids* grids, int exist, const uint32_t (&local)[COUNT],
                                         const int4 (&acc)[COUNT]) const {
#pragma unroll
        for (int u = 0; u < COUNT; ++u) {
            float y[QUAD];
            dequantize(c, grids[local[u]], acc[u], y);
            if (p.paired) {
                y[0] = silu(y[0]) * y[1];
                y[1] = silu(y[2]) * y[3];
                y[2] = y[3] = 0.0f;
            } else if constexpr (ACTIVATE) {
                activate(p.activation, y);
            }
            uint32_t codes[1];
            to_codes(grids[local[u]].output(), y, codes);
            int32_t sum = 0;
            const bool exists = static_cast<int>(local[u]) < exist;
            if (exists) sum = write(out.of_row(local[u]), codes[0]);
            if (p.sums) add_to_row(first_row + local[u], exists, sum);
        }
    }

  private:
    // The sum of what was written.
    __device__ __forceinline__ int32_t write(int8_t* out, uint32_t codes) const {
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
