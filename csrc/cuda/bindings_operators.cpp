// The operators, one launch each.
#include "bindings.h"
#include "operands.h"
#include "rows.h"

#include <pybind11/stl.h>

namespace ptq::cuda {
namespace {

void quantize(const Tensor& x, int activation, const Tensor& table, const Tensor& positions, const Tensor& codes,
              const Optional& sums, int device, uintptr_t stream) {
    const View in("x", x);
    in.shape({-1, -1});
    const int64_t rows = in.size(0), width = in.size(1);
    const QuantizeParams p =
        quantize_params(rows_of(in, rows, width), in_range("width", width, 0, 1 << 30),
                        static_cast<Activation>(in_range("activation", activation, 0, 3)), filled_table("table", table),
                        positions_of(View("positions", positions), rows),
                        dense_of<int8_t>(View("codes", codes), Element::i8, {rows, width}), sums_of(sums, rows));
    py::gil_scoped_release release;
    start(plan_quantize(p, rows), {device, stream});
}

void adaln_quant(const Tensor& x, int kind, float eps, const Optional& weight, const Optional& bias,
                 const Optional& scale, const Optional& shift, const Optional& mod_rows, float offset,
                 const Tensor& table, const Tensor& positions, const Tensor& codes, const Optional& sums, int device,
                 uintptr_t stream) {
    const View in("x", x);
    in.shape({-1, -1});
    const int64_t rows = in.size(0), width = in.size(1);
    BlockNorm norm;
    norm.kind = static_cast<NormKind>(in_range("norm_kind", kind, 0, 1));
    norm.eps = eps;
    if (weight) norm.weight = vector_of(View("weight", *weight), width);
    if (bias) norm.bias = vector_of(View("bias", *bias), width);
    norm.offset = offset;
    const Modulation mod = modulation_of(scale, shift, mod_rows, rows, width);
    const AdalnParams p =
        adaln_params(norm_operands(norm, rows_of(in, rows, width), width, mod.scale, mod.shift, mod.count, mod.map),
                     filled_table("table", table), positions_of(View("positions", positions), rows),
                     dense_of<int8_t>(View("codes", codes), Element::i8, {rows, width}), sums_of(sums, rows));
    py::gil_scoped_release release;
    start(plan_adaln_quant(p, rows), {device, stream});
}

void qkv_append(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                const Tensor& k_table, const Tensor& v_table, const Tensor& kv_group, int64_t heads, int kind,
                const Optional& q_weight, const Optional& q_bias, const Optional& k_weight, const Optional& k_bias,
                const Optional& q_scale, const Optional& rope, float eps, const Tensor& q, int device,
                uintptr_t stream) {
    const View in("qkv", qkv);
    in.shape({-1, -1});
    HeadOperands h;
    h.heads = in_range("num_heads", heads, 1, 1 << 20);
    h.head_dim = in.size(1) / (3 * heads);
    if (h.head_dim < 1) in.fail("is too narrow for the heads");
    h.tables = cache_tables(k_table, v_table, kv_group, heads, &h.groups, &h.slots);
    set_vectors(h, kind, eps, q_weight, q_bias, k_weight, k_bias, q_scale, rope);

    const Positions at = positions_of(View("positions", positions), in.size(0));
    const int64_t batch = View("k_cache", k_cache).size(0);
    const Cache k = cache_of("k_cache", k_cache, batch, heads, h.head_dim);
    const Cache v = cache_of("v_cache", v_cache, batch, heads, h.head_dim);
    if (k.slots != v.slots) throw std::invalid_argument("k_cache and v_cache differ in their slots");
    const Rows rows = rows_of(in, batch * at.count, 3 * heads * h.head_dim);
    in.dense();
    if (batch * at.count > 0 && (k.slots == 0 || h.slots == 0 || h.groups == 0)) {
        throw std::invalid_argument("the cache has no slots, or its tables no groups");
    }
    const View out("q", q);
    out.shape({batch, heads, at.count, h.head_dim});
    out.dense();
    if (out.dtype() != rows.dtype) out.fail("has another dtype than qkv");
    const AppendParams p = append_params(h, rows, out.address(), k, v, at, batch);
    py::gil_scoped_release release;
    start(plan_qkv_append(p), {device, stream});
}

}  // namespace

Table filled_table(const char* name, const Tensor& tensor) {
    const View v(name, tensor);
    const Table table = table_of(v);
    if (table.length == 0) v.fail("has no rows; pass one per position");
    return table;
}

int32_t* sums_of(const Optional& sums, int64_t rows) {
    return sums ? dense_of<int32_t>(View("row_sums", *sums), Element::i32, {rows}) : nullptr;
}

Modulation modulation_of(const Optional& scale, const Optional& shift, const Optional& index, int64_t rows,
                         int64_t width) {
    if (scale.has_value() != shift.has_value()) throw std::invalid_argument("modulation needs both scale and shift");
    Modulation m;
    if (!scale) return m;
    const View values("mod_scale", *scale);
    values.shape({-1, width});
    m.count = values.size(0);
    if (rows > 0 && m.count == 0) values.fail("has no rows; pass one per condition");
    m.scale = rows_of(values, m.count, width);
    m.shift = rows_of(View("mod_shift", *shift), m.count, width);
    if (m.shift.dtype != m.scale.dtype) throw std::invalid_argument("mod_shift has another dtype than mod_scale");
    m.map = map_of("mod_rows", index, rows, m.count);
    return m;
}

void set_vectors(HeadOperands& h, int kind, float eps, const Optional& q_weight, const Optional& q_bias,
                 const Optional& k_weight, const Optional& k_bias, const Optional& q_scale, const Optional& rope) {
    h.kind = static_cast<QkKind>(in_range("qk_kind", kind, 0, 3));
    h.eps = eps;
    const auto vector = [](const char* name, const Optional& given, int64_t size) {
        return given ? vector_of(View(name, *given), size) : Vector{};
    };
    h.q_weight = vector("q_weight", q_weight, h.head_dim);
    h.q_bias = vector("q_bias", q_bias, h.head_dim);
    h.k_weight = vector("k_weight", k_weight, h.head_dim);
    h.k_bias = vector("k_bias", k_bias, h.head_dim);
    h.q_scale = vector("q_scale", q_scale, h.heads);
    finish_heads(h, rope ? std::optional<View>(View("rope", *rope)) : std::nullopt);
}

void finish_heads(HeadOperands& h, const std::optional<View>& rope) {
    if (h.kind == QkKind::l2 && !h.q_scale.data) throw std::invalid_argument("l2 needs q_scale");
    if (h.kind != QkKind::rope) return;
    if (!rope || h.head_dim % 2 != 0) throw std::invalid_argument("rope needs its table and an even head dimension");
    rope->shape({-1, h.head_dim / 2, 2});
    rope->dense();
    h.rope = {rope->address(), rope->dtype()};
    h.slots = smaller(h.slots, rope->size(0));
}

void add_row_kernels(std::vector<const char*>& names) {
    names.push_back(quantize_kernel().name);
    for (int held = 1; held <= MAX_ROW_WIDTH / ROW_SEGMENT / (static_cast<int>(ADALN_THREADS) / 32); ++held) {
        names.push_back(adaln_quant_kernel(held).name);
    }
    names.push_back(qkv_append_kernel().name);
}

void bind_operators(py::module_& m) {
    m.def("quantize", &ptq::cuda::quantize);
    m.def("adaln_quant", &ptq::cuda::adaln_quant);
    m.def("qkv_append", &ptq::cuda::qkv_append);
}

}  // namespace ptq::cuda
