#include "block.h"

#include <stdexcept>

#include "checks.h"
#include "pack.h"
#include "threads.h"

namespace ptq {
namespace {

// Carves one buffer into aligned pieces; the first pass, without memory, only counts.
class Arena {
  public:
    explicit Arena(char* memory) : memory_(memory) {}

    template <typename T>
    T* take(int64_t count) {
        char* piece = memory_ ? memory_ + used_ : nullptr;
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return reinterpret_cast<T*>(piece);
    }
    int64_t used() const { return used_; }

  private:
    char* memory_;
    int64_t used_ = 0;
};

struct Buffers {
    Codes narrow, wide;  // inputs of qkv, proj and fc1; input of fc2
    char *qkv, *q, *mixed;

    Buffers(Arena& arena, const BlockPlan& plan, int64_t rows, int64_t element) {
        const int64_t inner = plan.heads * plan.head_dim;
        narrow = {arena.take<int8_t>(rows * (plan.width > inner ? plan.width : inner)), arena.take<int32_t>(rows)};
        wide = {arena.take<int8_t>(rows * plan.hidden), arena.take<int32_t>(rows)};
        qkv = arena.take<char>(rows * 3 * inner * element);
        q = arena.take<char>(rows * inner * element);
        mixed = arena.take<char>(rows * inner * element);
    }
};

AdalnArgs norm_args(const BlockNorm& norm, const BlockPlan& plan, const BlockCall& call, const Rows& x, int64_t rows,
                    const Table& table, const Codes& out) {
    AdalnArgs args{};
    args.rows = rows;
    args.width = plan.width;
    args.x = x;
    args.norm = norm.kind;
    args.eps = norm.eps;
    args.weight = norm.weight;
    args.bias = norm.bias;
    args.scale = chunk_of(call.modulation, norm.scale, plan.width);
    args.shift = chunk_of(call.modulation, norm.shift, plan.width);
    args.modulation = call.modulation_rows;
    args.offset = norm.offset;
    args.table = table;
    args.positions = call.positions;
    args.out = out;
    return args;
}

LinearArgs linear_args(const BlockLayer& layer, const BlockCall& call, const Codes& codes, int64_t rows) {
    LinearArgs args{};
    args.rows = rows;
    args.codes = codes.codes;
    args.row_sums = codes.sums;
    args.act_bits = largest_bits(layer.table, call.positions);
    args.weights = layer.weights;
    args.table = layer.table;
    args.positions = call.positions;
    return args;
}

void add_to_stream(LinearArgs& args, const BlockNorm& norm, const BlockPlan& plan, const BlockCall& call,
                   const Rows& residual) {
    Epilogue& e = args.epilogue;
    e.kind = Epilogue::Kind::gate_residual;
    e.gate = chunk_of(call.modulation, norm.gate, plan.width);
    e.gate_rows = call.modulation_rows;
    e.residual = residual;
    e.out = call.out;
}

// The products of codes that a kernel wrote. Builds for the sanitizers check that these are what the products rely on.
Status multiply(const Kernels& kernels, const LinearArgs& args, int threads) {
#if defined(PTQ_DEBUG)
    if (!kernels.good_codes(args, threads)) throw std::logic_error("codes outside their grid, or sums of other codes");
#endif
    return kernels.linear(args, threads);
}

}  // namespace

Status run_block(const Kernels& kernels, const BlockPlan& plan, const BlockCall& call, int threads) {
    const int64_t rows = call.batch * call.positions.count, inner = plan.heads * plan.head_dim;
    const DType dtype = call.in.dtype;
    Arena counting(nullptr);
    Buffers(counting, plan, rows, dtype_size(dtype));
    Arena arena(static_cast<char*>(block_scratch(counting.used())));
    const Buffers buffers(arena, plan, rows, dtype_size(dtype));
    Status status;

    // Attention.
    status =
        kernels.adaln_quant(norm_args(plan.norm1, plan, call, call.in, rows, plan.qkv.table, buffers.narrow), threads);
    if (status != Status::ok) return status;
    LinearArgs qkv = linear_args(plan.qkv, call, buffers.narrow, rows);
    qkv.epilogue.out = {buffers.qkv, dtype, 3 * inner};
    if ((status = multiply(kernels, qkv, threads)) != Status::ok) return status;

    AppendArgs append{};
    append.batch = call.batch;
    append.heads = plan.heads;
    append.head_dim = plan.head_dim;
    append.qkv = {buffers.qkv, dtype, 3 * inner};
    append.k = call.k;
    append.v = call.v;
    append.positions = call.positions;
    append.tables = plan.tables;
    append.kind = plan.qk_kind;
    append.q_weight = plan.q_weight;
    append.q_bias = plan.q_bias;
    append.k_weight = plan.k_weight;
    append.k_bias = plan.k_bias;
    append.eps = plan.qk_eps;
    append.q_scale = plan.q_scale;
    append.rope = plan.rope;
    append.q_out = {buffers.q, dtype, plan.head_dim};
    if ((status = kernels.qkv_append(append, threads)) != Status::ok) return status;

    AttentionArgs attention{};
    attention.batch = call.batch;
    attention.heads = plan.heads;
    attention.head_dim = plan.head_dim;
    attention.queries = call.positions.count;
    attention.q = {buffers.q, dtype, plan.head_dim};
    attention.k = call.k;
    attention.v = call.v;
    attention.visible_end = call.visible_end;
    attention.span = call.span;
    attention.tables = plan.tables;
    attention.softmax_scale = plan.softmax_scale;
    attention.out = {buffers.mixed, dtype, inner};
    kernels.attention(attention, threads);

    const Rows mixed{buffers.mixed, dtype, inner};
    const Codes mixed_codes = buffers.narrow;
    const QuantizeArgs quantize{rows, inner, mixed, Activation::none, plan.proj.table, call.positions, mixed_codes};
    if ((status = kernels.quantize(quantize, threads)) != Status::ok) return status;
    LinearArgs proj = linear_args(plan.proj, call, mixed_codes, rows);
    add_to_stream(proj, plan.norm1, plan, call, call.in);
    if ((status = multiply(kernels, proj, threads)) != Status::ok) return status;

    // MLP. The stream is in `out` from here on.
    const Rows stream{call.out.data, call.out.dtype, call.out.stride};
    status =
        kernels.adaln_quant(norm_args(plan.norm2, plan, call, stream, rows, plan.fc1.table, buffers.narrow), threads);
    if (status != Status::ok) return status;
    LinearArgs fc1 = linear_args(plan.fc1, call, buffers.narrow, rows);
    fc1.epilogue.kind = plan.swiglu ? Epilogue::Kind::swiglu_quant : Epilogue::Kind::quant;
    fc1.epilogue.activation = plan.activation;
    fc1.epilogue.codes = buffers.wide;
    fc1.epilogue.out_table = plan.fc2.table;
    if ((status = multiply(kernels, fc1, threads)) != Status::ok) return status;
    LinearArgs fc2 = linear_args(plan.fc2, call, buffers.wide, rows);
    add_to_stream(fc2, plan.norm2, plan, call, stream);
    return multiply(kernels, fc2, threads);
}

Status run_layer(const Kernels& kernels, const BlockLayer& layer, const BlockNorm* norm, Activation activation,
                 const BlockCall& call, int threads) {
    const int64_t width = layer.weights.in_features, rows = call.batch * call.positions.count;
    Arena counting(nullptr);
    counting.take<int8_t>(rows * width);
    counting.take<int32_t>(rows);
    Arena arena(static_cast<char*>(block_scratch(counting.used())));
    int8_t* const code = arena.take<int8_t>(rows * width);
    const Codes codes{code, arena.take<int32_t>(rows)};
    Status status;
    if (norm) {
        BlockPlan plan;
        plan.width = width;
        status = kernels.adaln_quant(norm_args(*norm, plan, call, call.in, rows, layer.table, codes), threads);
    } else {
        status = kernels.quantize({rows, width, call.in, activation, layer.table, call.positions, codes}, threads);
    }
    if (status != Status::ok) return status;
    LinearArgs args = linear_args(layer, call, codes, rows);
    args.epilogue.out = call.out;
    return multiply(kernels, args, threads);
}

}  // namespace ptq
