#include "block.h"

#include "rows.h"

namespace ptq::cuda {
namespace {

NormedProduct schedule_normed(const GemmLayer& layer, bool normed, int64_t rows, Output output,
                              const DeviceInfo& device) {
    NormedProduct product;
    product.plain = plan_gemm(layer.shape(rows, output), device);
    product.fused = normed && plan_gemm_norm(layer.shape(rows, output), device, &product.norm);
    return product;
}

// Partial sums of the products and of attention share memory: launches follow each other.
class Scratch {
  public:
    void need(const GemmPlan& plan) { need(plan.partial, plan.counters); }
    void need(const NormedProduct& product) {
        need(product.plain);
        if (product.fused) need(product.norm);
    }
    void need(int64_t numbers, int64_t counters) {
        numbers_ = larger(numbers_, numbers);
        counters_ = larger(counters_, counters);
    }
    Piece add_to(Workspace& workspace) const {
        workspace.counters = counters_;
        return workspace.add(4 * numbers_);
    }

  private:
    int64_t numbers_ = 0, counters_ = 0;
};

// nullptr for an empty piece: an operand that is absent.
template <typename T>
T* at(const Call& call, const Piece& piece) {
    if (piece.bytes == 0) return nullptr;
    return reinterpret_cast<T*>(call.workspace + piece.offset);
}

NormOperands norm_of_call(const BlockNorm& norm, const Call& call, const Rows& x, int64_t width) {
    return norm_operands(norm, x, width, chunk_of(call.modulation, norm.scale, width),
                         chunk_of(call.modulation, norm.shift, width), call.mod_count, call.map);
}

int64_t rows_of_call(const Call& call) {
    return call.batch * call.positions.count;
}

// The product of normalised rows, in one launch or two. `finish` fills in where it goes.
template <typename Finish>
void multiply_normed(const NormedProduct& product, const GemmLayer& layer, const NormOperands& norm, const Call& call,
                     const Piece& codes, const GemmScratch& scratch, const Finish& finish) {
    // Only the call knows its addresses. A fused kernel's rows are vectors; others go through codes.
    if (product.fused && norm_readable(norm.pointers, norm.settings)) {
        GemmParams p = gemm_params(layer, nullptr, call.positions, scratch);
        from_norm(p, norm);
        finish(p);
        start(launch_gemm(product.norm, p), call.stream);
        return;
    }
    const AdalnParams rows = adaln_params(norm, layer.table, call.positions, at<int8_t>(call, codes), nullptr);
    start(plan_adaln_quant(rows, rows_of_call(call)), call.stream);
    GemmParams p = gemm_params(layer, at<int8_t>(call, codes), call.positions, scratch);
    finish(p);
    start(launch_gemm(product.plain, p), call.stream);
}

// stream + gate * (product of codes), to call.out.
void add_to_stream(const GemmPlan& plan, const GemmLayer& layer, const BlockNorm& norm, int64_t width, const Call& call,
                   const Piece& codes, const GemmScratch& scratch, const void* stream) {
    GemmParams p = gemm_params(layer, at<int8_t>(call, codes), call.positions, scratch);
    to_residual(p, chunk_of(call.modulation, norm.gate, width), call.mod_count, call.map, stream, call.out.data,
                call.out.dtype);
    start(launch_gemm(plan, p), call.stream);
}

}  // namespace

LayerSchedule schedule_layer(const LayerPlan& plan, int64_t rows, const DeviceInfo& device) {
    LayerSchedule schedule;
    schedule.product = schedule_normed(plan.layer, plan.normed, rows, Output::store, device);
    schedule.codes = schedule.workspace.add(rows * plan.layer.in_features);
    Scratch scratch;
    scratch.need(schedule.product);
    schedule.scratch = scratch.add_to(schedule.workspace);
    return schedule;
}

void run_layer(const LayerPlan& plan, const LayerSchedule& schedule, const Call& call) {
    const int64_t rows = rows_of_call(call), width = plan.layer.in_features;
    if (rows == 0) return;
    const GemmScratch scratch{at<int32_t>(call, schedule.scratch), call.counters};
    const auto finish = [&](GemmParams& p) { to_floats(p, Activation::none, call.out.data, call.out.dtype); };
    if (plan.normed) {
        multiply_normed(schedule.product, plan.layer, norm_of_call(plan.norm, call, call.in, width), call,
                        schedule.codes, scratch, finish);
        return;
    }
    int8_t* codes = at<int8_t>(call, schedule.codes);
    const QuantizeParams quantized =
        quantize_params(call.in, width, plan.activation, plan.layer.table, call.positions, codes, nullptr);
    start(plan_quantize(quantized, rows), call.stream);
    GemmParams p = gemm_params(plan.layer, codes, call.positions, scratch);
    finish(p);
    start(launch_gemm(schedule.product.plain, p), call.stream);
}

BlockSchedule schedule_block(const BlockPlan& plan, int64_t batch, int64_t period, int64_t span, DType dtype,
                             const DeviceInfo& device) {
    const int64_t rows = batch * period, inner = plan.inner(), element = dtype_size(dtype);
    BlockSchedule s;
    s.qkv = schedule_normed(plan.qkv, true, rows, Output::store, device);
    s.proj = plan_gemm(plan.proj.shape(rows, Output::gate_residual), device);
    s.fc1 = schedule_normed(plan.fc1, true, rows, Output::quant, device);
    s.fc2 = plan_gemm(plan.fc2.shape(rows, Output::gate_residual), device);
    s.attention =
        plan_attention(batch * plan.heads.heads, period, span, 16 * ceil_div(plan.heads.head_dim, 16), device);
    s.codes = s.workspace.add(rows * larger(plan.width, inner));
    s.hidden = s.workspace.add(rows * plan.hidden);
    s.joined = s.workspace.add(rows * 3 * inner * element);
    if (period > 1) s.q = s.workspace.add(rows * inner * element);
    Scratch scratch;
    scratch.need(s.qkv);
    scratch.need(s.proj);
    scratch.need(s.fc1);
    scratch.need(s.fc2);
    scratch.need(s.attention.workspace, s.attention.counters);
    s.scratch = scratch.add_to(s.workspace);
    return s;
}

void run_block(const BlockPlan& plan, const BlockSchedule& schedule, const BlockCall& call) {
    if (rows_of_call(call) == 0) return;
    const DType dtype = call.in.dtype;
    const int64_t inner = plan.inner();
    const GemmScratch scratch{at<int32_t>(call, schedule.scratch), call.counters};
    const Rows joined{at<char>(call, schedule.joined), dtype, 3 * inner};

    multiply_normed(schedule.qkv, plan.qkv, norm_of_call(plan.norm1, call, call.in, plan.width), call, schedule.codes,
                    scratch,
                    [&](GemmParams& p) { to_floats(p, Activation::none, at<char>(call, schedule.joined), dtype); });

    const bool append = call.positions.count == 1;  // by attention itself
    const void* q = joined.data;
    if (!append) {
        void* const heads = at<char>(call, schedule.q);
        const AppendParams p = append_params(plan.heads, joined, heads, call.k, call.v, call.positions, call.batch);
        start(plan_qkv_append(p), call.stream);
        q = heads;
    }
    const AttentionOutput mixed{at<int8_t>(call, schedule.codes), plan.proj.table, nullptr};
    const AttentionParams attention = attention_params(
        plan.heads, plan.groups, q, dtype, call.k, call.v, call.visible_end, call.span, call.positions, call.batch,
        plan.softmax_scale, append, mixed, at<float>(call, schedule.scratch), call.counters);
    start(launch_attention(schedule.attention, attention), call.stream);
    add_to_stream(schedule.proj, plan.proj, plan.norm1, plan.width, call, schedule.codes, scratch, call.in.data);

    // The stream is in `out` from here on.
    const Rows stream{call.out.data, dtype, call.out.stride};
    multiply_normed(schedule.fc1, plan.fc1, norm_of_call(plan.norm2, call, stream, plan.width), call, schedule.codes,
                    scratch, [&](GemmParams& p) {
                        to_codes(p, plan.activation, at<int8_t>(call, schedule.hidden), nullptr, plan.fc2.table);
                    });
    add_to_stream(schedule.fc2, plan.fc2, plan.norm2, plan.width, call, schedule.hidden, scratch, stream.data);
}

}  // namespace ptq::cuda
