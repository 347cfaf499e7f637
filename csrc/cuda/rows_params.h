// Parameters of the kernels that work on rows: quantize, adaln_quant, qkv_append. Pointers come first (launch.h);
// nullptr is an absent operand.
#pragma once

#include "../types.h"

namespace ptq::cuda {

constexpr int ROW_SEGMENT = 256;                 // columns of a warp
constexpr int MAX_ROW_WIDTH = 48 * ROW_SEGMENT;  // 16 warps of three segments
constexpr int MAX_HEAD_DIM = 256;

// Operands of a normalisation: rows of x, and what is applied to them. Also the beginning of a GEMM that normalises.
struct NormPointers {
    const void *x, *weight, *bias;
    const void *scale, *shift;  // modulation: both or neither
    const int32_t* mod_rows;    // nullptr: row i for row i
};

// y = norm(x) * weight + bias; y = y * (offset + scale[r]) + shift[r]
struct NormSettings {
    int64_t x_stride, scale_stride, shift_stride;  // elements from one row to the next
    int64_t mod_count;                             // rows of scale and shift
    int width;
    NormKind kind;
    float eps, offset;
    DType x_dtype, weight_dtype, bias_dtype, mod_dtype;
};

// Where the grid of a row stands: table[positions[row % period]].
struct GridSettings {
    int64_t length;   // rows of the table
    uint32_t period;  // P
    int wide;         // positions are int64, else int32
};

struct AdalnParams {
    static constexpr int POINTERS = 10;

    NormPointers in;
    const Grid* table;
    const void* positions;
    int8_t* codes;  // [M, width], dense
    int32_t* sums;  // [M], or nullptr
    NormSettings norm;
    GridSettings grids;
};

struct QuantizeParams {
    static constexpr int POINTERS = 5;

    const void* x;  // [M, width]
    const Grid* table;
    const void* positions;
    int8_t* codes;
    int32_t* sums;  // [M], or nullptr
    int64_t x_stride;
    int width;
    DType x_dtype;
    Activation activation;
    GridSettings grids;
};

// One cache, int8 [B, H, S, lanes].
struct CacheStrides {
    int64_t batch, head;  // bytes
};

struct AppendParams {
    static constexpr int POINTERS = 14;

    const void* qkv;  // [B * P, 3 * H * d], dense
    void* q;          // [B, H, P, d], in the dtype of qkv
    int8_t *k_cache, *v_cache;
    const void* positions;                              // [P]
    const Grid *k_table, *v_table;                      // [G, H]
    const int32_t* kv_group;                            // [slots]
    const void *q_weight, *q_bias, *k_weight, *k_bias;  // layer_norm: [d] or nullptr
    const void* q_scale;                                // l2: [H]
    const void* rope;                                   // rope: [slots, d / 2, 2]
    CacheStrides k, v;
    int64_t slots;  // positions that have a slot, a group and a rotation
    int64_t items;  // B * P * H, less than 2^31
    int groups;     // G
    uint32_t heads, period;
    int head_dim, lanes;  // d, and bytes of a cached vector: a multiple of 16
    QkKind kind;
    float eps;
    int wide;  // positions are int64, else int32
    DType dtype, q_weight_dtype, q_bias_dtype, k_weight_dtype, k_bias_dtype, q_scale_dtype, rope_dtype;
};

}  // namespace ptq::cuda
