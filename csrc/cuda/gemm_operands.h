// Parameters of the GEMM kernels from operands, for operators and plans alike.
#pragma once

#include "gemm_plan.h"
#include "operands.h"

namespace ptq::cuda {

// One linear layer: weights in the kernels' order (backends/cuda/weights.py), and the position table of its input.
struct GemmLayer {
    const uint8_t* weights = nullptr;
    int bits = 8;
    int64_t out_features = 0, in_features = 0;
    bool paired = false;  // [w1; w3], alternating in the packed order
    const float* scale = nullptr;
    const int32_t* col_sums = nullptr;
    const float* bias = nullptr;  // or nullptr
    Table table;

    GemmShape shape(int64_t rows, Output output) const {
        return {rows, static_cast<int>(out_features), static_cast<int>(in_features), bits, output};
    }
    // Bytes of the packed weights.
    int64_t bytes() const {
        return ceil_div(out_features, N_ALIGN) * N_ALIGN * ceil_div(in_features, K_ALIGN) * K_ALIGN * bits / 8;
    }
};

// Where the partial sums of a plan go that has some.
struct GemmScratch {
    int32_t* partial = nullptr;
    unsigned int* counters = nullptr;
};

// What all outputs share. codes: [M, K], dense; nullptr for a kernel that normalises (from_norm).
inline GemmParams gemm_params(const GemmLayer& layer, const int8_t* codes, const Positions& positions,
                              const GemmScratch& scratch) {
    GemmParams p{};
    p.codes = codes;
    p.codes_stride = layer.in_features;
    p.weights = layer.weights;
    p.scale = layer.scale;
    p.col_sums = layer.col_sums;
    p.bias = layer.bias;
    p.table = layer.table.rows;
    p.positions = positions.data;
    p.partial = scratch.partial;
    p.counters = scratch.counters;
    p.paired = layer.paired;
    p.grids = grid_settings(layer.table, positions);
    return p;
}

inline void from_norm(GemmParams& p, const NormOperands& norm) {
    p.norm_in = norm.pointers;
    p.norm = norm.settings;
}

inline void to_floats(GemmParams& p, Activation activation, void* out, DType dtype) {
    p.out = out;
    p.out_dtype = dtype;
    p.activation = activation;
}

// Codes, dense, and their row sums, which have to be 0 before; nullptr if nobody wants them.
inline void to_codes(GemmParams& p, Activation activation, int8_t* out, int32_t* sums, const Table& table) {
    p.out = out;
    p.sums = sums;
    p.activation = activation;
    p.out_table = table.rows;
    p.out_length = table.length;
}

// out = residual + gate * y; gate.data == nullptr: residual + y. out may be the residual.
inline void to_residual(GemmParams& p, const Rows& gate, int64_t gate_count, const RowMap& map, const void* residual,
                        void* out, DType dtype) {
    p.gate = gate.data;
    p.gate_rows = gate.data ? map.index : nullptr;
    p.gate_count = gate_count;
    p.gate_stride = gate.stride;
    p.gate_dtype = gate.dtype;
    p.residual = residual;
    p.out = out;
    p.out_dtype = dtype;
}

}  // namespace ptq::cuda
