// Layers and blocks prepared once: their operands are checked when they are prepared. A call of a decode step brings
// addresses and numbers only, whose sizes Python checked (backends/cuda/plans.py): building views would cost as much as
// the launches.
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <tuple>

#include "bindings.h"
#include "block.h"

namespace ptq::cuda {
namespace {

using Info = std::tuple<int, int, int>;  // capability, multiprocessors, bytes of shared memory per block
using Address = uintptr_t;               // 0: absent
using CacheNumbers = std::tuple<Address, int64_t, int64_t>;  // address, batch and head strides
// address of [R, stride] floats, their dtype, R, stride, address of the row map
using ModulationNumbers = std::tuple<Address, int, int64_t, int64_t, Address>;
// address and width (int64?) of the positions, how many
using PositionNumbers = std::tuple<Address, bool, int64_t>;
// address of the workspace and of the counters
using WorkNumbers = std::tuple<Address, Address>;
using StreamNumbers = std::tuple<int, Address>;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

DeviceInfo device_of(const Info& info) {
    return {std::get<0>(info), std::get<1>(info), std::get<2>(info)};
}

DType dtype_of(int number) {
    return static_cast<DType>(in_range("dtype", number, 0, 2));
}

GemmLayer layer_of(const Operands& o) {
    GemmLayer layer;
    layer.bits = o.get<int>("bits");
    if (layer.bits != 6 && layer.bits != 8) {
        throw std::invalid_argument("bits is " + std::to_string(layer.bits) + ", expected 6 or 8");
    }
    layer.out_features = in_range("out_features", o.get<int64_t>("out_features"), 1, MAX_OUT_FEATURES);
    layer.in_features = in_range("in_features", o.get<int64_t>("in_features"), 1, MAX_IN_FEATURES);
    if (layer.in_features % 16 != 0) {
        throw std::invalid_argument("in_features is " + std::to_string(layer.in_features) +
                                    ", expected a multiple of 16: rows of codes are copied 16 bytes at a time");
    }
    layer.paired = o.get<bool>("paired");
    if (layer.paired && layer.out_features % 2 != 0) {
        throw std::invalid_argument("a paired layer has an even number of channels");
    }
    layer.weights = dense_of<const uint8_t>(o.view("weights"), Element::u8, {layer.bytes()});
    layer.scale = dense_of<const float>(o.view("w_scale"), Element::f32, {layer.out_features});
    layer.col_sums = dense_of<const int32_t>(o.view("col_sums"), Element::i32, {layer.out_features});
    if (o.has("bias")) layer.bias = dense_of<const float>(o.view("bias"), Element::f32, {layer.out_features});
    layer.table = filled_table("table", o.get<py::tuple>("table"));
    return layer;
}

void fill(Call& call, int64_t rows, const PositionNumbers& positions, const ModulationNumbers& modulation,
          const WorkNumbers& work, const StreamNumbers& stream) {
    call.positions = {pointer<const void>(std::get<0>(positions)), std::get<1>(positions), std::get<2>(positions)};
    call.batch = call.positions.count > 0 ? rows / call.positions.count : 0;
    if (std::get<0>(modulation)) {
        call.modulation = {pointer<const void>(std::get<0>(modulation)), dtype_of(std::get<1>(modulation)),
                           std::get<3>(modulation)};
        call.mod_count = std::get<2>(modulation);
        call.map.index = pointer<const int32_t>(std::get<4>(modulation));
    }
    call.workspace = pointer<char>(std::get<0>(work));
    call.counters = pointer<unsigned int>(std::get<1>(work));
    call.stream = {std::get<0>(stream), std::get<1>(stream)};
}

// Schedules by what they depend on. They are few: one per number of rows and step of a decode loop.
template <typename Schedule>
class Schedules {
  public:
    using Key = std::tuple<int64_t, int64_t, int64_t, int, Info>;  // batch, positions, span, dtype, device

    template <typename Make>
    std::shared_ptr<const Schedule> get(const Key& key, const Make& make) {
        const auto known = known_.find(key);
        if (known != known_.end()) return known->second;
        if (known_.size() >= MOST) known_.clear();
        return known_[key] = std::make_shared<const Schedule>(make());
    }

  private:
    static constexpr size_t MOST = 4096;
    std::map<Key, std::shared_ptr<const Schedule>> known_;
};

std::vector<std::tuple<int64_t, int64_t>> pieces_of(const Workspace& workspace) {
    std::vector<std::tuple<int64_t, int64_t>> pieces;
    for (const Piece& piece : workspace.pieces) pieces.emplace_back(piece.offset, piece.bytes);
    return pieces;
}

class Layer {
  public:
    explicit Layer(const py::dict& operands) {
        const Operands o(operands);
        plan_.layer = layer_of(o);
        if (plan_.layer.paired) throw std::invalid_argument("a paired layer belongs into a block");
        plan_.activation = static_cast<Activation>(in_range("activation", o.get<int>("activation"), 0, 3));
        plan_.normed = o.has("norm");
        if (plan_.normed) {
            plan_.norm = norm_of(o.sub("norm"), plan_.layer.in_features);
            if (plan_.norm.gate >= 0) throw std::invalid_argument("a layer's norm has no gate");
        }
    }

    // (bytes of the workspace, counters)
    std::tuple<int64_t, int64_t> needs(int64_t rows, const Info& info) {
        const auto schedule = schedule_for(rows, info);
        return {schedule->workspace.bytes, schedule->workspace.counters};
    }
    std::vector<std::tuple<int64_t, int64_t>> pieces(int64_t rows, const Info& info) {
        return pieces_of(schedule_for(rows, info)->workspace);
    }
    void run(Address x, int dtype, int64_t rows, const PositionNumbers& positions, const ModulationNumbers& modulation,
             Address out, const Info& info, const WorkNumbers& work, const StreamNumbers& stream) {
        Call call;
        fill(call, rows, positions, modulation, work, stream);
        call.in = {pointer<const void>(x), dtype_of(dtype), plan_.layer.in_features};
        call.out = {pointer<void>(out), call.in.dtype, plan_.layer.out_features};
        const auto schedule = schedule_for(rows, info);
        py::gil_scoped_release release;
        run_layer(plan_, *schedule, call);
    }

  private:
    std::shared_ptr<const LayerSchedule> schedule_for(int64_t rows, const Info& info) {
        return schedules_.get({rows, 1, 0, 0, info}, [&] { return schedule_layer(plan_, rows, device_of(info)); });
    }

    LayerPlan plan_;
    Schedules<LayerSchedule> schedules_;
};

class Block {
  public:
    explicit Block(const py::dict& operands) {
        const Operands o(operands);
        BlockPlan& p = plan_;
        HeadOperands& h = p.heads;
        h.heads = in_range("heads", o.get<int64_t>("heads"), 1, 1 << 20);
        h.head_dim = in_range("head_dim", o.get<int64_t>("head_dim"), 1, MAX_HEAD_DIM);
        p.qkv = layer_of(o.sub("qkv"));
        p.proj = layer_of(o.sub("proj"));
        p.fc1 = layer_of(o.sub("fc1"));
        p.fc2 = layer_of(o.sub("fc2"));
        p.width = p.qkv.in_features;
        p.hidden = p.fc2.in_features;
        p.norm1 = norm_of(o.sub("norm1"), p.width);
        p.norm2 = norm_of(o.sub("norm2"), p.width);
        const int activation = static_cast<int>(in_range("activation", o.get<int>("activation"), -1, 3));
        const bool swiglu = activation == -1;
        p.activation = swiglu ? Activation::none : static_cast<Activation>(activation);
        expect("qkv", p.qkv, p.width, 3 * p.inner(), false);
        expect("proj", p.proj, p.inner(), p.width, false);
        expect("fc1", p.fc1, p.width, swiglu ? 2 * p.hidden : p.hidden, swiglu);
        expect("fc2", p.fc2, p.hidden, p.width, false);
        h.kind = static_cast<QkKind>(in_range("qk_kind", o.get<int>("qk_kind"), 0, 3));
        h.eps = o.get<float>("qk_eps");
        h.q_weight = o.vector("q_weight", h.head_dim);
        h.q_bias = o.vector("q_bias", h.head_dim);
        h.k_weight = o.vector("k_weight", h.head_dim);
        h.k_bias = o.vector("k_bias", h.head_dim);
        h.q_scale = o.vector("q_scale", h.heads);
        h.tables = cache_tables(o.get<py::tuple>("k_table"), o.get<py::tuple>("v_table"), o.get<py::tuple>("kv_group"),
                                h.heads, &h.groups, &h.slots);
        if (h.groups == 0 || h.slots == 0) throw std::invalid_argument("the cache's tables have no groups or no slots");
        finish_heads(h, o.has("rope") ? std::optional<View>(o.view("rope")) : std::nullopt);
        p.groups = {static_cast<Grouping>(in_range("grouping", o.get<int>("grouping"), 0, 2)),
                    static_cast<int>(in_range("edge", o.get<int64_t>("edge"), 0, h.slots))};
        if (p.groups.grouping == Grouping::step && h.groups < 2) throw std::invalid_argument("a step has two groups");
        p.softmax_scale = o.get<float>("softmax_scale");
    }

    // Slots that have a group, and a rotation where there is one; chunks of the modulation.
    int64_t slots() const { return plan_.heads.slots; }
    int chunks() const { return plan_.chunks(); }

    // (bytes of the workspace, counters)
    std::tuple<int64_t, int64_t> needs(int64_t rows, int64_t period, int64_t span, int dtype, const Info& info) {
        const auto schedule = schedule_for(rows, period, span, dtype, info);
        return {schedule->workspace.bytes, schedule->workspace.counters};
    }
    // (offset, bytes) of what a workspace is cut into.
    std::vector<std::tuple<int64_t, int64_t>> pieces(int64_t rows, int64_t period, int64_t span, int dtype,
                                                     const Info& info) {
        return pieces_of(schedule_for(rows, period, span, dtype, info)->workspace);
    }
    void run(Address x, int dtype, int64_t rows, const PositionNumbers& positions, Address visible_end, int64_t span,
             const ModulationNumbers& modulation, const CacheNumbers& k, const CacheNumbers& v, int64_t slots,
             Address out, const Info& info, const WorkNumbers& work, const StreamNumbers& stream) {
        BlockCall call;
        fill(call, rows, positions, modulation, work, stream);
        call.in = {pointer<const void>(x), dtype_of(dtype), plan_.width};
        call.out = {pointer<void>(out), call.in.dtype, plan_.width};
        call.visible_end = pointer<const int32_t>(visible_end);
        call.span = span;
        const int64_t lanes = 16 * ceil_div(plan_.heads.head_dim, 16);
        call.k = {pointer<int8_t>(std::get<0>(k)), std::get<1>(k), std::get<2>(k), slots, lanes};
        call.v = {pointer<int8_t>(std::get<0>(v)), std::get<1>(v), std::get<2>(v), slots, lanes};
        const auto schedule = schedule_for(rows, call.positions.count, span, dtype, info);
        py::gil_scoped_release release;
        run_block(plan_, *schedule, call);
    }

  private:
    static void expect(const char* name, const GemmLayer& layer, int64_t in, int64_t out, bool paired) {
        if (layer.in_features != in || layer.out_features != out || layer.paired != paired) {
            throw std::invalid_argument(std::string(name) + " does not fit the block");
        }
    }

    std::shared_ptr<const BlockSchedule> schedule_for(int64_t rows, int64_t period, int64_t span, int dtype,
                                                      const Info& info) {
        const int64_t batch = period > 0 ? rows / period : 0;
        return schedules_.get({batch, period, span, dtype, info}, [&] {
            return schedule_block(plan_, batch, period, span, dtype_of(dtype), device_of(info));
        });
    }

    BlockPlan plan_;
    Schedules<BlockSchedule> schedules_;
};

}  // namespace

void bind_plans(py::module_& m) {
    py::class_<Layer>(m, "Layer")
        .def(py::init<const py::dict&>())
        .def("needs", &Layer::needs)
        .def("pieces", &Layer::pieces)
        .def("run", &Layer::run);
    py::class_<Block>(m, "Block")
        .def(py::init<const py::dict&>())
        .def_property_readonly("slots", &Block::slots)
        .def_property_readonly("chunks", &Block::chunks)
        .def("needs", &Block::needs)
        .def("pieces", &Block::pieces)
        .def("run", &Block::run);
}

}  // namespace ptq::cuda
