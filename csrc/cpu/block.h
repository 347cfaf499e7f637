// One transformer block in one call: what the operators do one by one, from operands prepared at load.
//
//   stream → norm 1, modulation → codes → qkv → cache, q → attention → codes → proj, gate, + stream
//          → norm 2, modulation → codes → fc1, activation → codes → fc2, gate, + stream
#pragma once

#include "kernels.h"

namespace ptq {

struct BlockLayer {
    Weights weights;
    Table table;
};

struct BlockPlan {
    int64_t width = 0, heads = 0, head_dim = 0, hidden = 0;  // hidden: input of fc2
    BlockNorm norm1, norm2;
    BlockLayer qkv, proj, fc1, fc2;
    bool swiglu = false;
    Activation activation = Activation::none;
    QkKind qk_kind = QkKind::none;
    Vector q_weight, q_bias, k_weight, k_bias, q_scale, rope;
    float qk_eps = 0;
    CacheTables tables;
    float softmax_scale = 1;
};

struct BlockCall {
    int64_t batch;
    Positions positions;
    const int32_t* visible_end;
    int64_t span;
    Rows modulation;  // [R, chunks * width]
    RowMap modulation_rows;
    Cache k, v;
    Rows in;          // [batch * positions.count, width]
    MutableRows out;  // of the same dtype; may be the same memory
};

Status run_block(const Kernels& kernels, const BlockPlan& plan, const BlockCall& call, int threads);

// One linear layer on floating-point rows: norm and modulation (norm given) or an activation, codes, products. Of
// `call` it needs batch, positions, modulation, in and out.
Status run_layer(const Kernels& kernels, const BlockLayer& layer, const BlockNorm* norm, Activation activation,
                 const BlockCall& call, int threads);

}  // namespace ptq
