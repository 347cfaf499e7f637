// What every instruction set offers, as a table of functions, and the arguments of each. Operands were checked by the
// bindings: pointers are valid for the sizes given, indices lie inside their tables, table rows obey the law.
#pragma once

#include "../types.h"

namespace ptq {

enum class Status : int {
    ok = 0,
    not_finite = 1,  // a NaN or infinity was to be quantized
};

// Codes int8 [rows, width], dense, and their row sums.
struct Codes {
    int8_t* codes = nullptr;
    int32_t* sums = nullptr;
};

// q = Q(act(x))
struct QuantizeArgs {
    int64_t rows, width;
    Rows x;
    Activation activation;
    Table table;
    Positions positions;
    Codes out;
};

// y = norm(x) * weight + bias; y = y * (offset + scale[r]) + shift[r]; q = Q(y)
struct AdalnArgs {
    int64_t rows, width;
    Rows x;
    NormKind norm;
    float eps;
    Vector weight, bias;
    Rows scale, shift;  // both or neither
    RowMap modulation;
    float offset;
    Table table;
    Positions positions;
    Codes out;
};

// Packed weights of one linear layer in the order of pack.h.
struct Weights {
    const uint8_t* panels = nullptr;
    int bits = 8;
    int64_t out_features = 0, in_features = 0;
    bool paired = false;  // two halves [w1; w3], each padded to whole panels on its own
    const float* scale = nullptr;
    const int32_t* col_sums = nullptr;
    const float* bias = nullptr;  // or nullptr
};

// The layer y = (delta * s_j) * float(acc - zq * C_j) + b_j and what becomes of y; formulas in epilogue.h.
struct Epilogue {
    enum class Kind : int { store, quant, swiglu_quant, gate_residual };
    Kind kind = Kind::store;
    Activation activation = Activation::none;  // store, quant
    MutableRows out;                           // store, gate_residual
    Codes codes;                               // quant, swiglu_quant
    Table out_table;
    Rows gate;  // gate_residual; absent: residual + y
    RowMap gate_rows;
    Rows residual;  // may be the same memory as out
};

struct LinearArgs {
    int64_t rows;
    const int8_t* codes;  // [rows, in_features]
    const int32_t* row_sums;
    int act_bits;  // largest among the rows: how often products may be added in 16 bits
    Weights weights;
    Table table;
    Positions positions;
    Epilogue epilogue;
};

// q, k, v = split(qkv); q, k = kind(q, k); cache[position] = Q(k), Q(v)
struct AppendArgs {
    int64_t batch, heads, head_dim;
    Rows qkv;  // [batch * positions.count, 3 * heads * head_dim]
    Cache k, v;
    Positions positions;
    CacheTables tables;
    QkKind kind;
    Vector q_weight, q_bias, k_weight, k_bias;  // layer_norm
    float eps;
    Vector q_scale;     // l2, [heads]
    Vector rope;        // rope, [positions, head_dim / 2, 2]
    MutableRows q_out;  // [batch * heads * positions.count, head_dim], in the order [B, H, P]
};

// out = softmax_{j < visible_end[i]}(q . K^ * softmax_scale) . V^
struct AttentionArgs {
    int64_t batch, heads, head_dim, queries;
    Rows q;  // [batch * heads * queries, head_dim], in the order [B, H, P]
    Cache k, v;
    const int32_t* visible_end;  // [queries]
    int64_t span;
    CacheTables tables;
    float softmax_scale;
    MutableRows out;  // [batch * queries, heads * head_dim]
};

struct Kernels {
    const char* name;
    Status (*quantize)(const QuantizeArgs&, int threads);
    Status (*adaln_quant)(const AdalnArgs&, int threads);
    Status (*linear)(const LinearArgs&, int threads);
    Status (*qkv_append)(const AppendArgs&, int threads);
    void (*attention)(const AttentionArgs&, int threads);
    // Whether every code lies in the grid of its position and the row sums are those of the codes.
    bool (*good_codes)(const LinearArgs&, int threads);
    // Operations (two per product and sum) per second of the bare register loop that a width allows, best of several.
    double (*products)(int bits, int act_bits, int threads);
    int32_t (*read_memory)(const void* memory, int64_t bytes);
};

// One per instruction set; nullptr when it was not compiled in.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_amx();
const Kernels* kernels_avx512vnni();

}  // namespace ptq
