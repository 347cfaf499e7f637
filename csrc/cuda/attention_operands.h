// Parameters of the attention kernels from operands, for operators and plans alike.
#pragma once

#include "attention_plan.h"
#include "operands.h"

namespace ptq::cuda {

// How slots are grouped, as somebody who could look at kv_group found it; otherwise grouping_of(groups).
struct SlotGroups {
    Grouping grouping = Grouping::table;
    int edge = 0;
};

inline SlotGroups grouping_of(int64_t groups) {
    return {groups == 1 ? Grouping::one : Grouping::table, 0};
}

// Where the result goes: floats of the stream, or (table.rows) codes of `table` at the positions, and their row sums.
struct AttentionOutput {
    void* data = nullptr;
    Table table;
    int32_t* sums = nullptr;  // added to
};

// q: [B, H, P, d], or with `append` the output of the qkv layer [B, 3 H d]. visible_end: [P]. positions.count is P; of
// positions without data (floats, nothing appended) only that. The workspace and counters are those of the plan.
inline AttentionParams attention_params(const HeadOperands& h, const SlotGroups& slot_groups, const void* q,
                                        DType dtype, const Cache& k, const Cache& v, const int32_t* visible_end,
                                        int64_t span, const Positions& positions, int64_t batch, double softmax_scale,
                                        bool append, const AttentionOutput& output, float* workspace,
                                        unsigned int* counters) {
    AttentionParams p{};
    fill_caches(p, h, k, v, positions, dtype);
    if (append) fill_vectors(p, h);
    p.q = q;
    p.out = output.data;
    p.sums = output.sums;
    p.visible_end = visible_end;
    p.out_table = output.table.rows;
    p.workspace = workspace;
    p.counters = counters;
    p.out_length = output.table.length;
    p.pairs = batch * h.heads;
    p.span = static_cast<int>(span);
    p.edge = slot_groups.edge;
    constexpr double LOG2_E = 1.4426950408889634;
    p.scale_high = static_cast<float>(softmax_scale * LOG2_E);
    p.scale_low = static_cast<float>(softmax_scale * LOG2_E - p.scale_high);
    p.grouping = slot_groups.grouping;
    p.append = append;
    return p;
}

}  // namespace ptq::cuda
