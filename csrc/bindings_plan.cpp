// Layers and blocks prepared once and called once per decode step: their operands are checked when they are prepared,
// and a call checks only what it brings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/block.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"
#include "operands.h"

namespace ptq {
namespace {

// One team for all loops of a call.
template <typename Kernel>
int run_team(int threads, const Kernel& kernel) {
    return ptq::run([&] {
        Status status = Status::ok;
        team(threads, [&] { status = kernel(); });
        return status;
    });
}

BlockLayer layer_of(const Operands& o) {
    const PackShape shape = pack_shape(o.get<int64_t>("out_features"), o.get<int64_t>("in_features"),
                                       o.get<int>("bits"), o.get<bool>("paired"));
    BlockLayer layer;
    layer.weights = {
        dense_of<const uint8_t>(o.view("panels"), Element::u8, {shape.bytes()}),
        shape.bits,
        shape.out_features,
        shape.in_features,
        shape.paired,
        dense_of<const float>(o.view("w_scale"), Element::f32, {shape.out_features}),
        dense_of<const int32_t>(o.view("col_sums"), Element::i32, {shape.out_features}),
        o.has("bias") ? dense_of<const float>(o.view("bias"), Element::f32, {shape.out_features}) : nullptr};
    layer.table = table_of(o.view("table"));
    for (int64_t i = 0; i < layer.table.length; ++i) {
        if (!lawful(layer.table.rows[i], false)) o.view("table").fail("has a row that breaks the law");
    }
    return layer;
}

// Modulation of a call: [R, >= chunks * width], needed exactly when there are chunks. False: a row map that leaves it.
bool bring_modulation(BlockCall& call, const Optional& modulation, const Optional& rows, int64_t count, int chunks,
                      int64_t width) {
    if ((chunks > 0) != modulation.has_value()) {
        throw std::invalid_argument(chunks > 0 ? "modulation is missing" : "modulation has nothing to modulate here");
    }
    if (!modulation) return true;
    const View values("modulation", *modulation);
    values.shape({-1, -1});
    if (values.size(1) < chunks * width) values.fail("has too few chunks");
    call.modulation = rows_of(values, values.size(0), values.size(1));
    call.modulation_rows = map_of("modulation rows", rows, count, values.size(0));
    return good_map(call.modulation_rows, count, values.size(0));
}

// Input and output rows [M, ...] of one call; M from the input.
int64_t bring_rows(BlockCall& call, const Tensor& x, const Tensor& positions, const Tensor& out, int64_t in_width,
                   int64_t out_width) {
    const View in("x", x);
    in.shape({-1, in_width});
    const int64_t rows = in.size(0);
    call.in = rows_of(in, rows, in_width);
    call.out = mutable_rows_of(View("out", out), rows, out_width);
    call.positions = positions_of(View("positions", positions), rows);
    call.batch = call.positions.count ? rows / call.positions.count : 0;
    return rows;
}

class Layer {
  public:
    explicit Layer(const py::dict& operands) : layer_(layer_of(Operands(operands))) {
        const Operands o(operands);
        activation_ = static_cast<Activation>(in_range("activation", o.get<int>("activation"), 0, 3));
        if (o.has("norm")) {
            norm_ = norm_of(o.sub("norm"), layer_.weights.in_features);
            if (norm_->gate >= 0) throw std::invalid_argument("a layer's norm has no gate");
        }
        if (layer_.weights.paired) throw std::invalid_argument("a paired layer belongs into a block");
    }

    int run(const Tensor& x, const Tensor& positions, const Optional& modulation, const Optional& modulation_rows,
            const Tensor& out, int threads) const {
        BlockCall call{};
        const int64_t width = layer_.weights.in_features;
        const int64_t rows = bring_rows(call, x, positions, out, width, layer_.weights.out_features);
        const bool good = bring_modulation(call, modulation, modulation_rows, rows, norm_ ? norm_->chunks() : 0, width);
        checked_threads(threads);
        if (!good || !ptq::in_range(call.positions, layer_.table.length)) return BAD_DATA;
        if (rows * width * layer_.weights.out_features < SERIAL_PRODUCTS) threads = 1;
        return run_team(threads, [&] {
            return run_layer(kernels(), layer_, norm_ ? &*norm_ : nullptr, activation_, call, threads);
        });
    }

  private:
    BlockLayer layer_;
    std::optional<BlockNorm> norm_;
    Activation activation_ = Activation::none;
};

class Block {
  public:
    explicit Block(const py::dict& operands) {
        const Operands o(operands);
        BlockPlan& p = plan_;
        p.heads = in_range("heads", o.get<int64_t>("heads"), 1, 1 << 20);
        p.head_dim = in_range("head_dim", o.get<int64_t>("head_dim"), 1, MAX_IN_FEATURES);
        p.qkv = layer_of(o.sub("qkv"));
        p.proj = layer_of(o.sub("proj"));
        p.fc1 = layer_of(o.sub("fc1"));
        p.fc2 = layer_of(o.sub("fc2"));
        p.width = p.qkv.weights.in_features;
        p.hidden = p.fc2.weights.in_features;
        p.norm1 = norm_of(o.sub("norm1"), p.width);
        p.norm2 = norm_of(o.sub("norm2"), p.width);
        const int activation = static_cast<int>(in_range("activation", o.get<int>("activation"), -1, 3));
        p.swiglu = activation == -1;
        p.activation = p.swiglu ? Activation::none : static_cast<Activation>(activation);
        const int64_t inner = p.heads * p.head_dim;
        expect("qkv", p.qkv, p.width, 3 * inner, false);
        expect("proj", p.proj, inner, p.width, false);
        expect("fc1", p.fc1, p.width, p.swiglu ? 2 * p.hidden : p.hidden, p.swiglu);
        expect("fc2", p.fc2, p.hidden, p.width, false);
        p.qk_kind = static_cast<QkKind>(in_range("qk_kind", o.get<int>("qk_kind"), 0, 3));
        p.q_weight = o.vector("q_weight", p.head_dim);
        p.q_bias = o.vector("q_bias", p.head_dim);
        p.k_weight = o.vector("k_weight", p.head_dim);
        p.k_bias = o.vector("k_bias", p.head_dim);
        p.q_scale = o.vector("q_scale", p.heads);
        p.qk_eps = o.get<float>("qk_eps");
        if (p.qk_kind == QkKind::l2 && !p.q_scale.data) throw std::invalid_argument("l2 needs q_scale");
        int64_t groups = 0;
        p.tables = cache_tables(o.get<py::tuple>("k_table"), o.get<py::tuple>("v_table"), o.get<py::tuple>("kv_group"),
                                p.heads, &groups, &slots_);
        if (!good_cache_tables(p.tables, groups, p.heads)) {
            o.view("k_table").fail("or v_table has a row that breaks the law");
        }
        for (int64_t i = 0; i < slots_; ++i) in_range("kv_group", p.tables.group[i], 0, groups - 1);
        if (p.qk_kind == QkKind::rope) {
            const View rope = o.view("rope");
            rope.shape({-1, p.head_dim / 2, 2});
            rope.dense();
            p.rope = {rope.address(), rope.dtype()};
            slots_ = slots_ < rope.size(0) ? slots_ : rope.size(0);
        }
        p.softmax_scale = o.get<float>("softmax_scale");
        length_ = slots_;
        for (const BlockLayer* layer : {&p.qkv, &p.proj, &p.fc1, &p.fc2}) {
            length_ = length_ < layer->table.length ? length_ : layer->table.length;
        }
    }

    int run(const Tensor& x, const Tensor& positions, const Tensor& visible_end, int64_t span,
            const Optional& modulation, const Optional& modulation_rows, const Tensor& k_cache, const Tensor& v_cache,
            const Tensor& out, int threads) const {
        const BlockPlan& p = plan_;
        BlockCall call{};
        const int64_t rows = bring_rows(call, x, positions, out, p.width, p.width);
        if (call.out.dtype != call.in.dtype) throw std::invalid_argument("out has another dtype than x");
        const int chunks1 = p.norm1.chunks(), chunks2 = p.norm2.chunks();
        bool good =
            bring_modulation(call, modulation, modulation_rows, rows, chunks1 > chunks2 ? chunks1 : chunks2, p.width);
        call.k = cache_of("k_cache", k_cache, call.batch, p.heads, p.head_dim);
        call.v = cache_of("v_cache", v_cache, call.batch, p.heads, p.head_dim);
        if (call.k.slots != call.v.slots) throw std::invalid_argument("k_cache and v_cache differ in their slots");
        call.visible_end =
            dense_of<const int32_t>(View("visible_end", visible_end), Element::i32, {call.positions.count});
        const int64_t slots = slots_ < call.k.slots ? slots_ : call.k.slots;
        call.span = in_range("span", span, 0, slots);
        checked_threads(threads);
        good = good && ptq::in_range(call.positions, length_ < slots ? length_ : slots) && distinct(call.positions);
        for (int64_t i = 0; i < call.positions.count; ++i) {
            good = good && call.visible_end[i] >= 1 && call.visible_end[i] <= span;
        }
        if (!good) return BAD_DATA;
        return run_team(threads, [&] { return run_block(kernels(), p, call, threads); });
    }

  private:
    static void expect(const char* name, const BlockLayer& layer, int64_t in, int64_t out, bool paired) {
        if (layer.weights.in_features != in || layer.weights.out_features != out || layer.weights.paired != paired) {
            throw std::invalid_argument(std::string(name) + " does not fit the block");
        }
    }

    BlockPlan plan_;
    int64_t slots_ = 0, length_ = 0;
};

}  // namespace

void bind_plans(py::module_& m) {
    py::class_<Layer>(m, "Layer").def(py::init<const py::dict&>()).def("run", &Layer::run);
    py::class_<Block>(m, "Block").def(py::init<const py::dict&>()).def("run", &Block::run);
}

}  // namespace ptq
