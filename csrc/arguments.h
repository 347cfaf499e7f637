// Arguments of the compiled modules from what Python hands over: what the bindings of the CPU and of CUDA share. Only
// metadata is looked at, since data may lie in a GPU's memory.
#pragma once

#include <optional>
#include <string>

#include "views.h"

namespace ptq {

using Tensor = py::tuple;
using Optional = std::optional<py::tuple>;

constexpr int64_t MAX_IN_FEATURES = 8704, MAX_OUT_FEATURES = int64_t{1} << 24;

inline int64_t in_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", expected " +
                                    std::to_string(low) + " to " + std::to_string(high));
    }
    return value;
}

inline RowMap map_of(const char* name, const Optional& index, int64_t rows, int64_t sources) {
    if (index) return {dense_of<const int32_t>(View(name, *index), Element::i32, {rows})};
    in_range("rows of the conditioning tensor", sources, rows, rows);
    return {};
}

inline Cache cache_of(const char* name, const Tensor& tensor, int64_t batch, int64_t heads, int64_t head_dim) {
    const View v(name, tensor);
    v.shape({batch, heads, -1, 16 * ceil_div(head_dim, 16)});
    v.dense(2);
    return {v.as<int8_t>(Element::i8), v.stride(0), v.stride(1), v.size(2), v.size(3)};
}

// The tables and how many groups and slots they have.
inline CacheTables cache_tables(const Tensor& k_table, const Tensor& v_table, const Tensor& group, int64_t heads,
                                int64_t* groups, int64_t* slots) {
    const View k("k_table", k_table), v("v_table", v_table), g("kv_group", group);
    k.shape({-1, heads, 4});
    *groups = k.size(0);
    g.shape({-1});
    *slots = g.size(0);
    k.dense();
    return {k.as<const Grid>(Element::f32),
            reinterpret_cast<const Grid*>(dense_of<const float>(v, Element::f32, {*groups, heads, 4})),
            dense_of<const int32_t>(g, Element::i32, {*slots})};
}

// A dictionary whose entries are numbers, tensors, dictionaries or None: the operands of a plan.
class Operands {
  public:
    explicit Operands(const py::dict& entries) : entries_(entries) {}

    bool has(const char* name) const { return entries_.contains(name) && !entries_[name].is_none(); }
    View view(const char* name) const { return View(name, get<py::tuple>(name)); }
    template <typename T>
    T get(const char* name) const {
        if (!has(name)) throw std::invalid_argument(std::string(name) + " is missing");
        try {
            return py::cast<T>(entries_[name]);
        } catch (const py::cast_error&) {
            throw std::invalid_argument(std::string(name) + " has the wrong type");
        }
    }
    Operands sub(const char* name) const { return Operands(get<py::dict>(name)); }
    Vector vector(const char* name, int64_t size) const { return has(name) ? vector_of(view(name), size) : Vector{}; }

  private:
    py::dict entries_;
};

inline BlockNorm norm_of(const Operands& o, int64_t width) {
    BlockNorm norm;
    norm.kind = static_cast<NormKind>(in_range("norm_kind", o.get<int>("kind"), 0, 1));
    norm.eps = o.get<float>("eps");
    norm.weight = o.vector("weight", width);
    norm.bias = o.vector("bias", width);
    norm.offset = o.get<float>("offset");
    norm.scale = o.get<int>("scale");
    norm.shift = o.get<int>("shift");
    norm.gate = o.get<int>("gate");
    if ((norm.scale < 0) != (norm.shift < 0)) throw std::invalid_argument("modulation needs both scale and shift");
    return norm;
}

}  // namespace ptq
