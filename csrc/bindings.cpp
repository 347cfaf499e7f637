// The boundary to Python: tensors arrive as (address, dtype, sizes, strides), results as a status. No torch header, so
// that one binary serves every torch release.
//
// Wrong metadata raises here (ValueError, through std::invalid_argument). Wrong data - a position outside its table, a
// code outside its grid, a NaN - gives the status BAD_DATA, and nothing is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/limits.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "operands.h"

namespace ptq {
namespace {

// --- weights
// -----------------------------------------------------------------------------------------------------------

int64_t packed_bytes(int64_t out_features, int64_t in_features, int bits, bool paired) {
    return pack_shape(out_features, in_features, bits, paired).bytes();
}

int pack(const Tensor& rows, const Tensor& panels, int64_t in_features, int bits, bool paired, int threads) {
    const View source("qweight", rows);
    source.shape({-1, -1});
    const PackShape shape = pack_shape(source.size(0), in_features, bits, paired);
    const uint8_t* from = dense_of<const uint8_t>(source, Element::u8, {shape.out_features, shape.row_bytes()});
    uint8_t* to = dense_of<uint8_t>(View("panels", panels), Element::u8, {shape.bytes()});
    checked_threads(threads);
    return run([&] { return pack_panels(shape, from, to, threads) ? Status::ok : Status::not_finite; });
}

void unpack(const Tensor& panels, const Tensor& rows, int64_t in_features, int bits, bool paired, int threads) {
    const View target("qweight", rows);
    target.shape({-1, -1});
    const PackShape shape = pack_shape(target.size(0), in_features, bits, paired);
    uint8_t* to = dense_of<uint8_t>(target, Element::u8, {shape.out_features, shape.row_bytes()});
    const uint8_t* from = dense_of<const uint8_t>(View("panels", panels), Element::u8, {shape.bytes()});
    checked_threads(threads);
    py::gil_scoped_release release;
    unpack_panels(shape, from, to, threads);
}

// --- operators
// ---------------------------------------------------------------------------------------------------------

int quantize(const Tensor& x, int activation, const Tensor& table, const Tensor& positions, const Tensor& codes,
             const Tensor& sums, int threads) {
    const View in("x", x);
    in.shape({-1, -1});
    const int64_t rows = in.size(0), width = in.size(1);
    QuantizeArgs args{rows,
                      width,
                      rows_of(in, rows, width),
                      static_cast<Activation>(in_range("activation", activation, 0, 3)),
                      table_of(View("table", table)),
                      positions_of(View("positions", positions), rows),
                      codes_of(codes, sums, rows, width)};
    checked_threads(threads);
    if (!good_table(args.table, args.positions)) return BAD_DATA;
    return run([&] { return kernels().quantize(args, threads); });
}

int adaln_quant(const Tensor& x, int norm, float eps, const Optional& weight, const Optional& bias,
                const Optional& scale, const Optional& shift, const Optional& mod_rows, float offset,
                const Tensor& table, const Tensor& positions, const Tensor& codes, const Tensor& sums, int threads) {
    const View in("x", x);
    in.shape({-1, -1});
    const int64_t rows = in.size(0), width = in.size(1);
    AdalnArgs args{};
    args.rows = rows;
    args.width = width;
    args.x = rows_of(in, rows, width);
    args.norm = static_cast<NormKind>(in_range("norm_kind", norm, 0, 1));
    args.eps = eps;
    if (weight) args.weight = vector_of(View("weight", *weight), width);
    if (bias) args.bias = vector_of(View("bias", *bias), width);
    args.table = table_of(View("table", table));
    args.positions = positions_of(View("positions", positions), rows);
    args.out = codes_of(codes, sums, rows, width);
    args.offset = offset;
    checked_threads(threads);
    if (scale.has_value() != shift.has_value()) throw std::invalid_argument("modulation needs both scale and shift");
    if (scale) {
        const View values("mod_scale", *scale);
        args.scale = rows_of(values, values.size(0), width);
        args.shift = rows_of(View("mod_shift", *shift), values.size(0), width);
        args.modulation = map_of("mod_rows", mod_rows, rows, values.size(0));
        if (!good_map(args.modulation, rows, values.size(0))) return BAD_DATA;
    }
    if (!good_table(args.table, args.positions)) return BAD_DATA;
    return run([&] { return kernels().adaln_quant(args, threads); });
}

// The operands all epilogues share; false when data is bad.
bool fill_linear(LinearArgs& args, const Tensor& codes, const Tensor& sums, const Tensor& panels, int bits,
                 int64_t out_features, int64_t in_features, bool paired, const Tensor& scale, const Tensor& col_sums,
                 const Optional& bias, const Tensor& table, const Tensor& positions) {
    const View in("codes", codes);
    in.shape({-1, in_features});
    const PackShape shape = pack_shape(out_features, in_features, bits, paired);
    const Codes operand = codes_of(codes, sums, in.size(0), in_features);
    args.rows = in.size(0);
    args.codes = operand.codes;
    args.row_sums = operand.sums;
    args.weights = {dense_of<const uint8_t>(View("panels", panels), Element::u8, {shape.bytes()}),
                    bits,
                    out_features,
                    in_features,
                    paired,
                    dense_of<const float>(View("w_scale", scale), Element::f32, {out_features}),
                    dense_of<const int32_t>(View("col_sums", col_sums), Element::i32, {out_features}),
                    bias ? dense_of<const float>(View("bias", *bias), Element::f32, {out_features}) : nullptr};
    args.table = table_of(View("table", table));
    args.positions = positions_of(View("positions", positions), args.rows);
    if (!good_table(args.table, args.positions)) return false;
    args.act_bits = largest_bits(args.table, args.positions);
    return true;
}

int run_linear(const LinearArgs& args, int threads) {
    checked_threads(threads);
    return run([&] {
        if (!kernels().good_codes(args, threads)) return Status::not_finite;
        return kernels().linear(args, threads);
    });
}

int linear(const Tensor& codes, const Tensor& sums, const Tensor& panels, int bits, int64_t out_features,
           int64_t in_features, const Tensor& scale, const Tensor& col_sums, const Optional& bias, const Tensor& table,
           const Tensor& positions, int activation, const Tensor& out, int threads) {
    LinearArgs args{};
    const bool good = fill_linear(args, codes, sums, panels, bits, out_features, in_features, false, scale, col_sums,
                                  bias, table, positions);
    args.epilogue.activation = static_cast<Activation>(in_range("activation", activation, 0, 3));
    args.epilogue.out = mutable_rows_of(View("out", out), args.rows, out_features);
    return good ? run_linear(args, threads) : BAD_DATA;
}

// activation -1: SwiGLU of the two halves of a paired layer.
int linear_quant(const Tensor& codes, const Tensor& sums, const Tensor& panels, int bits, int64_t out_features,
                 int64_t in_features, const Tensor& scale, const Tensor& col_sums, const Optional& bias,
                 const Tensor& table, const Tensor& positions, int activation, const Tensor& out_table,
                 const Tensor& out_codes, const Tensor& out_sums, int threads) {
    const bool swiglu = in_range("activation", activation, -1, 3) == -1;
    LinearArgs args{};
    const bool good = fill_linear(args, codes, sums, panels, bits, out_features, in_features, swiglu, scale, col_sums,
                                  bias, table, positions);
    Epilogue& e = args.epilogue;
    e.kind = swiglu ? Epilogue::Kind::swiglu_quant : Epilogue::Kind::quant;
    if (!swiglu) e.activation = static_cast<Activation>(activation);
    e.codes = codes_of(out_codes, out_sums, args.rows, swiglu ? out_features / 2 : out_features);
    e.out_table = table_of(View("out_table", out_table));
    if (!good || !good_table(e.out_table, args.positions)) return BAD_DATA;
    return run_linear(args, threads);
}

int linear_gate_residual(const Tensor& codes, const Tensor& sums, const Tensor& panels, int bits, int64_t out_features,
                         int64_t in_features, const Tensor& scale, const Tensor& col_sums, const Optional& bias,
                         const Tensor& table, const Tensor& positions, const Optional& gate, const Optional& gate_rows,
                         const Tensor& residual, const Tensor& out, int threads) {
    LinearArgs args{};
    bool good = fill_linear(args, codes, sums, panels, bits, out_features, in_features, false, scale, col_sums, bias,
                            table, positions);
    Epilogue& e = args.epilogue;
    e.kind = Epilogue::Kind::gate_residual;
    e.residual = rows_of(View("residual", residual), args.rows, out_features);
    e.out = mutable_rows_of(View("out", out), args.rows, out_features);
    if (gate) {
        const View values("gate", *gate);
        e.gate = rows_of(values, values.size(0), out_features);
        e.gate_rows = map_of("gate_rows", gate_rows, args.rows, values.size(0));
        good = good && good_map(e.gate_rows, args.rows, values.size(0));
    }
    return good ? run_linear(args, threads) : BAD_DATA;
}

// --- the cache
// ---------------------------------------------------------------------------------------------------------

int qkv_append(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
               const Tensor& k_table, const Tensor& v_table, const Tensor& kv_group, int64_t heads, int kind,
               const Optional& q_weight, const Optional& q_bias, const Optional& k_weight, const Optional& k_bias,
               const Optional& q_scale, const Optional& rope, float eps, const Tensor& q, int threads) {
    const View in("qkv", qkv);
    in.shape({-1, -1});
    in_range("num_heads", heads, 1, 1 << 20);
    AppendArgs args{};
    args.heads = heads;
    args.head_dim = in.size(1) / (3 * heads);
    if (args.head_dim < 1) in.fail("is too narrow for the heads");
    args.positions = positions_of(View("positions", positions), in.size(0));
    args.batch = View("k_cache", k_cache).size(0);
    args.qkv = rows_of(in, args.batch * args.positions.count, 3 * heads * args.head_dim);
    args.k = cache_of("k_cache", k_cache, args.batch, heads, args.head_dim);
    args.v = cache_of("v_cache", v_cache, args.batch, heads, args.head_dim);
    if (args.v.slots != args.k.slots) throw std::invalid_argument("k_cache and v_cache differ in their slots");
    int64_t groups, slots;
    args.tables = cache_tables(k_table, v_table, kv_group, heads, &groups, &slots);
    args.kind = static_cast<QkKind>(in_range("qk_kind", kind, 0, 3));
    const int64_t d = args.head_dim;
    if (q_weight) args.q_weight = vector_of(View("q_weight", *q_weight), d);
    if (q_bias) args.q_bias = vector_of(View("q_bias", *q_bias), d);
    if (k_weight) args.k_weight = vector_of(View("k_weight", *k_weight), d);
    if (k_bias) args.k_bias = vector_of(View("k_bias", *k_bias), d);
    args.eps = eps;
    int64_t rotated = slots;
    if (args.kind == QkKind::l2) {
        if (!q_scale) throw std::invalid_argument("l2 needs q_scale");
        args.q_scale = vector_of(View("q_scale", *q_scale), heads);
    } else if (args.kind == QkKind::rope) {
        if (!rope || d % 2 != 0) throw std::invalid_argument("rope needs its table and an even head dimension");
        const View r("rope", *rope);
        r.shape({-1, d / 2, 2});
        r.dense();
        args.rope = {r.address(), r.dtype()};
        rotated = r.size(0);
    }
    const View out("q", q);
    out.shape({args.batch, heads, args.positions.count, d});
    out.dense();
    args.q_out = {out.address(), out.dtype(), d};
    checked_threads(threads);
    int64_t limit = slots < args.k.slots ? slots : args.k.slots;
    limit = limit < rotated ? limit : rotated;
    if (!in_range(args.positions, limit) || !distinct(args.positions)) return BAD_DATA;
    for (int64_t i = 0; i < args.positions.count; ++i) {
        const int32_t group = args.tables.group[args.positions.at(i)];
        if (group < 0 || group >= groups) return BAD_DATA;
    }
    if (!good_cache_tables(args.tables, groups, heads)) return BAD_DATA;
    return run([&] { return kernels().qkv_append(args, threads); });
}

int attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& visible_end, int64_t span,
              const Tensor& k_table, const Tensor& v_table, const Tensor& kv_group, float softmax_scale,
              const Tensor& out, int threads) {
    const View in("q", q);
    in.shape({-1, -1, -1, -1});
    in.dense();
    AttentionArgs args{};
    args.batch = in.size(0);
    args.heads = in.size(1);
    args.queries = in.size(2);
    args.head_dim = in.size(3);
    args.q = {in.address(), in.dtype(), args.head_dim};
    args.k = cache_of("k_cache", k_cache, args.batch, args.heads, args.head_dim);
    args.v = cache_of("v_cache", v_cache, args.batch, args.heads, args.head_dim);
    args.visible_end = dense_of<const int32_t>(View("visible_end", visible_end), Element::i32, {args.queries});
    int64_t groups, slots;
    args.tables = cache_tables(k_table, v_table, kv_group, args.heads, &groups, &slots);
    if (args.v.slots != args.k.slots) throw std::invalid_argument("k_cache and v_cache differ in their slots");
    args.span = in_range("span", span, 0, args.k.slots < slots ? args.k.slots : slots);
    args.softmax_scale = softmax_scale;
    args.out = mutable_rows_of(View("out", out), args.batch * args.queries, args.heads * args.head_dim);
    checked_threads(threads);
    for (int64_t i = 0; i < args.queries; ++i) {
        if (args.visible_end[i] < 1 || args.visible_end[i] > span) return BAD_DATA;
    }
    for (int64_t i = 0; i < span; ++i) {
        if (args.tables.group[i] < 0 || args.tables.group[i] >= groups) return BAD_DATA;
    }
    if (!good_cache_tables(args.tables, groups, args.heads)) return BAD_DATA;
    return run([&] {
        kernels().attention(args, threads);
        return Status::ok;
    });
}

}  // namespace
}  // namespace ptq

PYBIND11_MODULE(_cpu, m) {
    using namespace ptq;
    m.doc() = "CPU kernels. Internal: use ptq4arvg_kernels.";
    m.def("instruction_sets", [] {
        std::vector<std::tuple<std::string, bool, bool>> sets;  // name, compiled, supported by this machine
        for (int i = 0; i < INSTRUCTION_SETS; ++i) {
            const InstructionSet& set = instruction_sets()[i];
            sets.emplace_back(set.name, set.kernels != nullptr, set.supported);
        }
        return sets;
    });
    m.def("instruction_set", [] { return std::string(kernels().name); });
    m.def("select", [](const std::string& name) { return ptq::select(name.c_str()); });
    m.def("thread_team", [] { return std::string(thread_team()); });
    m.def("set_thread_team", &set_thread_team);
    m.def("packed_bytes", &packed_bytes);
    m.def("advise_large_pages", [](const Tensor& memory) {
        const View v("memory", memory);
        v.shape({-1});
        v.dense();
        advise_large_pages(v.as<uint8_t>(Element::u8), v.size(0));
    });
    m.def("release_freed_memory", &release_freed_memory);
    m.def("pack", &ptq::pack);
    m.def("unpack", &ptq::unpack);
    m.def("quantize", &ptq::quantize);
    m.def("adaln_quant", &ptq::adaln_quant);
    m.def("linear", &ptq::linear);
    m.def("linear_quant", &ptq::linear_quant);
    m.def("linear_gate_residual", &ptq::linear_gate_residual);
    m.def("qkv_append", &ptq::qkv_append);
    m.def("attention", &ptq::attention);
    bind_plans(m);
    m.def("measure_read", &measure_read, py::call_guard<py::gil_scoped_release>());
    m.def(
        "measure_products",
        [](int bits, int act_bits, int threads) { return kernels().products(bits, act_bits, threads); },
        py::call_guard<py::gil_scoped_release>());
}
