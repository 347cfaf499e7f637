// Parameters of the attention kernels. Pointers come first (launch.h); nullptr is an absent operand.
#pragma once

#include "rows_params.h"

namespace ptq::cuda {

// How slots are grouped. one: all in group 0; step: those below `edge` in group 0, the others in group 1, so that
// nothing is read per slot; table: kv_group says.
enum class Grouping : int { one = 0, step = 1, table = 2 };

struct AttentionParams {
    static constexpr int POINTERS = 19;

    const void* q;  // [B, H, P, d]; append: the output of the qkv layer, [B, 3 H d]. Dense
    int8_t *k_cache, *v_cache;
    void* out;                                          // [B P, H d], floats in the dtype of q, or codes. Dense
    int32_t* sums;                                      // [B P]: row sums of the codes are added; or nullptr
    const int32_t* visible_end;                         // [P]
    const void* positions;                              // [P]: of codes, and of what is appended
    const Grid *k_table, *v_table;                      // [G, H]
    const int32_t* kv_group;                            // [span]
    const void *q_weight, *q_bias, *k_weight, *k_bias;  // append, layer_norm: [d] or nullptr
    const void* q_scale;                                // append, l2: [H]
    const void* rope;                                   // append, rope: [slots, d / 2, 2]
    const Grid* out_table;                              // of the codes; nullptr: floats
    float* workspace;                                   // of a plan with splits
    unsigned int* counters;                             // one per tile of queries, 0 before and after

    CacheStrides k, v;
    int64_t slots;       // append: positions that have a slot, a group and a rotation
    int64_t out_length;  // rows of out_table
    int64_t pairs;       // B H
    int span;            // slots to look at, at most
    int edge, groups;
    uint32_t heads, period;
    int head_dim, lanes;          // d, and bytes of a cached vector: a multiple of 16
    float scale_high, scale_low;  // their sum is softmax_scale * log2(e)
    float eps;
    Grouping grouping;
    QkKind kind;
    int append;  // k and v of one new token per sequence are written to the caches first
    int wide;    // positions are int64, else int32
    DType dtype, q_weight_dtype, q_bias_dtype, k_weight_dtype, k_bias_dtype, q_scale_dtype, rope_dtype;
};

}  // namespace ptq::cuda
