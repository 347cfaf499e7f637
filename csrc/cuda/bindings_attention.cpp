// Attention, its plan, and its fused form with quantize-and-append before and quantize after.
#include "attention_operands.h"
#include "bindings.h"

#include <pybind11/stl.h>

#include <tuple>

namespace ptq::cuda {
namespace {

// plan_attention(pairs, period, span, lanes, (capability, multiprocessors, shared bytes)) -> (kernel, queries per
// block, warps, splits)
std::tuple<const char*, int, unsigned, unsigned> plan(int64_t pairs, int64_t period, int64_t span, int64_t lanes,
                                                      const std::tuple<int, int, int>& device) {
    const DeviceInfo info{std::get<0>(device), std::get<1>(device), std::get<2>(device)};
    const AttentionPlan p = plan_attention(pairs, period, span, lanes, info);
    return {attention_kernel(p).name, p.shape().queries(), p.warps, p.splits};
}

// (floats of the workspace, counters) of a plan
std::tuple<int64_t, int64_t> scratch(int64_t pairs, int64_t period, int64_t lanes, int64_t warps, int64_t splits) {
    const AttentionPlan p = attention_plan_with(pairs, period, lanes, warps, splits);
    return {p.workspace, p.counters};
}

float* workspace_of(const Optional& workspace, int64_t floats) {
    return floats ? dense_of<float>(View("workspace", *workspace), Element::f32, {floats}) : nullptr;
}

// One launch. `q` is [B, H, P, d], or with `kind` (append) [B, 3 H d]; vectors and rope as in qkv_append. warps and
// splits: of plan_attention.
void attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& visible_end, int64_t span,
               const Tensor& k_table, const Tensor& v_table, const Tensor& kv_group, double softmax_scale,
               int64_t heads, int grouping, int edge, const std::optional<int>& kind, const Optional& q_weight,
               const Optional& q_bias, const Optional& k_weight, const Optional& k_bias, const Optional& q_scale,
               const Optional& rope, float eps, const Tensor& out, const Optional& out_table, const Optional& positions,
               const Optional& sums, int64_t warps, int64_t splits, const Optional& workspace, const Optional& counters,
               int device, uintptr_t stream) {
    const View in("q", q), seen("visible_end", visible_end);
    in.dense();
    HeadOperands h;
    h.heads = in_range("num_heads", heads, 1, 1 << 20);
    h.tables = cache_tables(k_table, v_table, kv_group, heads, &h.groups, &h.slots);
    int64_t batch, period;
    if (kind) {
        in.shape({-1, -1});
        batch = in.size(0), period = 1, h.head_dim = in.size(1) / (3 * heads);
        in.shape({batch, 3 * heads * h.head_dim});
        set_vectors(h, *kind, eps, q_weight, q_bias, k_weight, k_bias, q_scale, rope);
    } else {
        in.shape({-1, heads, -1, -1});
        batch = in.size(0), period = in.size(2), h.head_dim = in.size(3);
    }
    if (h.head_dim < 1) in.fail("is too narrow for the heads");
    in_range("head_dim", h.head_dim, 1, MAX_HEAD_DIM);
    const Cache k = cache_of("k_cache", k_cache, batch, heads, h.head_dim);
    const Cache v = cache_of("v_cache", v_cache, batch, heads, h.head_dim);
    if (k.slots != v.slots) throw std::invalid_argument("k_cache and v_cache differ in their slots");
    in_range("span", span, 1, smaller(k.slots, h.slots));
    if (h.groups == 0) throw std::invalid_argument("k_table and v_table have no groups");
    SlotGroups slot_groups{static_cast<Grouping>(in_range("grouping", grouping, 0, 2)),
                           static_cast<int>(in_range("edge", edge, 0, 0x7FFFFFFF))};
    if (slot_groups.grouping == Grouping::step && h.groups < 2) throw std::invalid_argument("a step has two groups");

    Positions at;
    at.count = period;
    if (out_table || kind) {
        if (!positions) throw std::invalid_argument("positions are missing");
        at = positions_of(View("positions", *positions), period);
        if (at.count != period) throw std::invalid_argument("positions: one is needed for each query");
    }
    AttentionOutput output;
    const View result("out", out);
    result.shape({batch * period, heads * h.head_dim});
    result.dense();
    output.data = result.address();
    if (out_table) {
        result.as<int8_t>(Element::i8);
        output.table = table_of(View("out_table", *out_table));
        if (output.table.length == 0) throw std::invalid_argument("out_table has no rows");
        if (sums) output.sums = dense_of<int32_t>(View("sums", *sums), Element::i32, {batch * period});
    } else if (result.dtype() != in.dtype()) {
        result.fail("has another dtype than q");
    }
    if (batch * period == 0) return;

    const AttentionPlan plan = attention_plan_with(batch * heads, period, k.lanes, warps, splits);
    if (plan.splits > 1 && !(workspace && counters)) throw std::invalid_argument("workspace and counters are missing");
    unsigned int* counts = nullptr;
    if (plan.splits > 1) {
        const View given("counters", *counters);
        counts = reinterpret_cast<unsigned int*>(given.as<int32_t>(Element::i32));
        given.dense();
        in_range("counters", given.size(0), plan.counters, int64_t{1} << 40);
    }
    const AttentionParams p = attention_params(
        h, slot_groups, in.address(), in.dtype(), k, v, dense_of<const int32_t>(seen, Element::i32, {period}), span, at,
        batch, softmax_scale, kind.has_value(), output, workspace_of(workspace, plan.workspace), counts);
    py::gil_scoped_release release;
    start(launch_attention(plan, p), {device, stream});
}

}  // namespace

void add_attention_kernels(std::vector<const char*>& names) {
    for (int head_class = 0; head_class < HEAD_CLASSES; ++head_class) {
        names.push_back(decode_kernel(head_class).name);
        names.push_back(block_attention_kernel(head_class).name);
    }
}

void bind_attention(py::module_& m) {
    m.def("plan_attention", &plan);
    m.def("attention_scratch", &scratch);
    m.def("attention", &ptq::cuda::attention);
}

}  // namespace ptq::cuda
