// The integer linear layers and their plans.
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "gemm_operands.h"

namespace ptq::cuda {
namespace {

using Info = std::tuple<int, int, int>;  // capability, multiprocessors, bytes of shared memory per block

GemmShape shape_of(int64_t rows, int64_t channels, int64_t width, int bits, int output) {
    in_range("out_features", channels, 1, MAX_OUT_FEATURES);
    in_range("in_features", width, 1, MAX_IN_FEATURES);
    return {rows, static_cast<int>(channels), static_cast<int>(width), bits,
            static_cast<Output>(in_range("output", output, 0, 2))};
}

DeviceInfo device_of(const Info& info) {
    return {std::get<0>(info), std::get<1>(info), std::get<2>(info)};
}

// A norm in front: (x, kind, eps, weight, bias, scale, shift, mod_rows, offset), as in adaln_quant.
NormOperands norm_of_tuple(const py::tuple& t, int64_t rows, int64_t width) {
    if (t.size() != 9) throw std::invalid_argument("norm has " + std::to_string(t.size()) + " entries, expected 9");
    const auto tensor = [&](int i) { return py::cast<Optional>(t[i]); };
    BlockNorm norm;
    norm.kind = static_cast<NormKind>(in_range("norm_kind", py::cast<int>(t[1]), 0, 1));
    norm.eps = py::cast<float>(t[2]);
    if (tensor(3)) norm.weight = vector_of(View("weight", *tensor(3)), width);
    if (tensor(4)) norm.bias = vector_of(View("bias", *tensor(4)), width);
    norm.offset = py::cast<float>(t[8]);
    const Rows x = rows_of(View("x", py::cast<py::tuple>(t[0])), rows, width);
    const Modulation m = modulation_of(tensor(5), tensor(6), tensor(7), rows, width);
    return norm_operands(norm, x, width, m.scale, m.shift, m.count, m.map);
}

// One launch of a plan. codes: None with a norm. activation -1: SwiGLU, of paired weights. Which of out_table, gate and
// residual are needed, the plan's output says.
void gemm(const GemmPlan& plan, const Optional& codes, const std::optional<py::tuple>& norm, const Tensor& weights,
          const Tensor& scale, const Tensor& col_sums, const Optional& bias, const Tensor& table,
          const Tensor& positions, int activation, const Tensor& out, const Optional& sums, const Optional& out_table,
          const Optional& gate, const Optional& gate_rows, const Optional& residual, const Optional& partial,
          const Optional& counters, int device, uintptr_t stream) {
    const int64_t rows = plan.shape.rows, channels = plan.shape.channels, width = plan.shape.width;
    const bool swiglu = in_range("activation", activation, -1, 3) == -1;
    GemmLayer layer;
    layer.bits = plan.shape.bits;
    layer.out_features = channels;
    layer.in_features = width;
    layer.paired = swiglu;
    const View packed("weights", weights);
    packed.shape({ceil_div(channels, N_ALIGN) * (N_ALIGN / STRIP), -1, -1});
    packed.dense();
    layer.weights = packed.as<const uint8_t>(Element::u8);
    if (packed.size(0) * packed.size(1) * packed.size(2) != layer.bytes()) packed.fail("do not fit the layer");
    layer.scale = dense_of<const float>(View("w_scale", scale), Element::f32, {channels});
    layer.col_sums = dense_of<const int32_t>(View("col_sums", col_sums), Element::i32, {channels});
    if (bias) layer.bias = dense_of<const float>(View("bias", *bias), Element::f32, {channels});
    layer.table = filled_table("table", table);

    GemmScratch scratch;
    if (plan.counters > 0) {
        if (!partial || !counters) throw std::invalid_argument("partial sums and counters are missing");
        scratch.partial = dense_of<int32_t>(View("partial", *partial), Element::i32, {plan.partial});
        const View counts("counters", *counters);
        counts.shape({-1});
        counts.dense();
        scratch.counters = reinterpret_cast<unsigned int*>(counts.as<int32_t>(Element::i32));
        in_range("counters", counts.size(0), plan.counters, int64_t{1} << 40);
    }
    if (plan.norm != norm.has_value() || plan.norm == codes.has_value()) {
        throw std::invalid_argument(plan.norm ? "this plan normalises: pass norm, not codes" : "codes are missing");
    }
    const int8_t* in = codes ? dense_of<const int8_t>(View("codes", *codes), Element::i8, {rows, width}) : nullptr;
    GemmParams p = gemm_params(layer, in, positions_of(View("positions", positions), rows), scratch);
    if (norm) from_norm(p, norm_of_tuple(*norm, rows, width));
    const View result("out", out);
    result.shape({rows, swiglu ? channels / 2 : channels});
    result.dense();
    const Activation act = swiglu ? Activation::none : static_cast<Activation>(activation);
    switch (plan.shape.output) {
        case Output::store:
            if (swiglu) throw std::invalid_argument("SwiGLU gives codes, not floats");
            to_floats(p, act, result.address(), result.dtype());
            break;
        case Output::quant:
            if (!out_table) throw std::invalid_argument("out_table is missing");
            if (channels % 2 != 0 && swiglu)
                throw std::invalid_argument("a paired layer has an even number of channels");
            to_codes(p, act, result.as<int8_t>(Element::i8), sums_of(sums, rows),
                     filled_table("out_table", *out_table));
            break;
        case Output::gate_residual: {
            if (activation != 0) throw std::invalid_argument("nothing is applied in front of a gate");
            if (!residual) throw std::invalid_argument("residual is missing");
            const Rows before = rows_of(View("residual", *residual), rows, channels);
            if (before.dtype != result.dtype()) result.fail("has another dtype than residual");
            if (before.stride != channels && rows > 1) throw std::invalid_argument("residual is not contiguous");
            Rows gates;
            RowMap map;
            int64_t count = 0;
            if (gate) {
                const View values("gate", *gate);
                values.shape({-1, channels});
                count = values.size(0);
                if (rows > 0 && count == 0) values.fail("has no rows; pass one per condition");
                gates = rows_of(values, count, channels);
                map = map_of("gate_rows", gate_rows, rows, count);
            }
            to_residual(p, gates, count, map, before.data, result.address(), before.dtype);
        }
    }
    const Launch launch = launch_gemm(plan, p);
    py::gil_scoped_release release;
    start(launch, {device, stream});
}

}  // namespace

void bind_gemm(py::module_& m) {
    py::class_<GemmPlan>(m, "GemmPlan")
        .def_property_readonly(
            "kernel", [](const GemmPlan& p) { return gemm_kernel(p.shape.bits, p.shape.output, p.tile, p.norm).name; })
        .def_property_readonly("rows", [](const GemmPlan& p) { return p.tile_shape().rows(); })
        .def_property_readonly("channels", [](const GemmPlan& p) { return p.tile_shape().channels(); })
        .def_property_readonly("threads", [](const GemmPlan& p) { return p.tile_shape().threads(); })
        .def_property_readonly("stages", [](const GemmPlan& p) { return p.tile_shape().stages; })
        .def_property_readonly("step_k", [](const GemmPlan& p) { return p.tile_shape().step_k(); })
        .def_property_readonly("grid",
                               [](const GemmPlan& p) { return std::make_tuple(p.grid[0], p.grid[1], p.grid[2]); })
        .def_property_readonly("splits", [](const GemmPlan& p) { return p.grid[2]; })
        .def_property_readonly("asked", &GemmPlan::asked)
        .def_readonly("norm", &GemmPlan::norm)
        .def_readonly("shared", &GemmPlan::shared)
        .def_readonly("partial", &GemmPlan::partial)
        .def_readonly("counters", &GemmPlan::counters)
        .def_readonly("cycles", &GemmPlan::cycles);
    m.def("plan_gemm", [](int64_t rows, int64_t channels, int64_t width, int bits, int output, const Info& info) {
        return plan_gemm(shape_of(rows, channels, width, bits, output), device_of(info));
    });
    m.def("gemm_plans", [](int64_t rows, int64_t channels, int64_t width, int bits, int output, const Info& info) {
        return gemm_plans(shape_of(rows, channels, width, bits, output), device_of(info));
    });
    m.def("plan_gemm_norm", [](int64_t rows, int64_t channels, int64_t width, int bits, int output, const Info& info) {
        GemmPlan plan;
        const bool found = plan_gemm_norm(shape_of(rows, channels, width, bits, output), device_of(info), &plan);
        return found ? std::optional<GemmPlan>(plan) : std::nullopt;
    });
    m.def("gemm", &ptq::cuda::gemm);
}

void add_gemm_kernels(std::vector<const char*>& names) {
    for (int bits : {6, 8}) {
        for (Output output : {Output::store, Output::quant, Output::gate_residual}) {
            for (int tile = 0; tile < TILE_COUNT; ++tile) {
                names.push_back(gemm_kernel(bits, output, tile, false).name);
            }
            if (output == Output::gate_residual) continue;
            for (int tile = 0; tile < NORM_TILE_COUNT; ++tile) {
                names.push_back(gemm_kernel(bits, output, tile, true).name);
            }
        }
    }
}

}  // namespace ptq::cuda
