// Parts of kernel parameters from operands, for operators and plans alike.
#pragma once

#include "rows_params.h"

namespace ptq::cuda {

inline GridSettings grid_settings(const Table& table, const Positions& positions) {
    return {table.length, static_cast<uint32_t>(positions.count), positions.wide};
}

inline QuantizeParams quantize_params(const Rows& x, int64_t width, Activation activation, const Table& table,
                                      const Positions& positions, int8_t* codes, int32_t* sums) {
    QuantizeParams p{};
    p.x = x.data;
    p.table = table.rows;
    p.positions = positions.data;
    p.codes = codes;
    p.sums = sums;
    p.x_stride = x.stride;
    p.width = static_cast<int>(width);
    p.x_dtype = x.dtype;
    p.activation = activation;
    p.grids = grid_settings(table, positions);
    return p;
}

// What a norm reads: x, and of `modulation` [R, chunks * width] its chunks. `map`: which row of it belongs to a row.
struct NormOperands {
    NormPointers pointers;
    NormSettings settings;
};

inline NormOperands norm_operands(const BlockNorm& norm, const Rows& x, int64_t width, const Rows& scale,
                                  const Rows& shift, int64_t mod_count, const RowMap& map) {
    NormOperands n{};
    n.pointers = {x.data, norm.weight.data, norm.bias.data, scale.data, shift.data, scale.data ? map.index : nullptr};
    n.settings = {x.stride, scale.stride, shift.stride, mod_count,         static_cast<int>(width), norm.kind,
                  norm.eps, norm.offset,  x.dtype,      norm.weight.dtype, norm.bias.dtype,         scale.dtype};
    return n;
}

inline AdalnParams adaln_params(const NormOperands& norm, const Table& table, const Positions& positions, int8_t* codes,
                                int32_t* sums) {
    return {norm.pointers, table.rows, positions.data, codes, sums, norm.settings, grid_settings(table, positions)};
}

// Where the heads of a layer keep their keys and values, and what is done to them before.
struct HeadOperands {
    int64_t heads = 0, head_dim = 0, groups = 0,
            slots = 0;  // slots: those with a group, and a rotation where there is one
    QkKind kind = QkKind::none;
    float eps = 0;
    Vector q_weight, q_bias, k_weight, k_bias, q_scale, rope;
    CacheTables tables;
};

// What kernels on heads have in common: caches, tables, positions and sizes. P: AppendParams or AttentionParams.
template <class P>
void fill_caches(P& p, const HeadOperands& h, const Cache& k, const Cache& v, const Positions& positions, DType dtype) {
    p.k_cache = k.data;
    p.v_cache = v.data;
    p.positions = positions.data;
    p.k_table = h.tables.k;
    p.v_table = h.tables.v;
    p.kv_group = h.tables.group;
    p.k = {k.batch_stride, k.head_stride};
    p.v = {v.batch_stride, v.head_stride};
    p.slots = smaller(h.slots, k.slots);
    p.groups = static_cast<int>(h.groups);
    p.heads = static_cast<uint32_t>(h.heads);
    p.period = static_cast<uint32_t>(positions.count);
    p.head_dim = static_cast<int>(h.head_dim);
    p.lanes = static_cast<int>(k.lanes);
    p.wide = positions.wide;
    p.dtype = dtype;
}

// What is done to q and k of new tokens.
template <class P>
void fill_vectors(P& p, const HeadOperands& h) {
    p.q_weight = h.q_weight.data;
    p.q_bias = h.q_bias.data;
    p.k_weight = h.k_weight.data;
    p.k_bias = h.k_bias.data;
    p.q_scale = h.q_scale.data;
    p.rope = h.rope.data;
    p.kind = h.kind;
    p.eps = h.eps;
    p.q_weight_dtype = h.q_weight.dtype;
    p.q_bias_dtype = h.q_bias.dtype;
    p.k_weight_dtype = h.k_weight.dtype;
    p.k_bias_dtype = h.k_bias.dtype;
    p.q_scale_dtype = h.q_scale.dtype;
    p.rope_dtype = h.rope.dtype;
}

inline AppendParams append_params(const HeadOperands& h, const Rows& qkv, void* q, const Cache& k, const Cache& v,
                                  const Positions& positions, int64_t batch) {
    AppendParams p{};
    fill_caches(p, h, k, v, positions, qkv.dtype);
    fill_vectors(p, h);
    p.qkv = qkv.data;
    p.q = q;
    p.items = batch * positions.count * h.heads;
    return p;
}

}  // namespace ptq::cuda
