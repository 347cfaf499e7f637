// Operands of the kernels from what Python hands over, and what the two binding files share.
#pragma once

#include <optional>
#include <string>

#include "cpu/checks.h"
#include "cpu/pack.h"
#include "views.h"

namespace ptq {

constexpr int OK = 0, BAD_DATA = 1;

using Tensor = py::tuple;
using Optional = std::optional<py::tuple>;

inline int checked_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected at least 1");
    return threads;
}

inline int64_t in_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", expected " +
                                    std::to_string(low) + " to " + std::to_string(high));
    }
    return value;
}

template <typename Kernel>
int run(const Kernel& kernel) {
    py::gil_scoped_release release;
    return kernel() == Status::ok ? OK : BAD_DATA;
}

inline Codes codes_of(const Tensor& codes, const Tensor& sums, int64_t rows, int64_t width) {
    return {dense_of<int8_t>(View("codes", codes), Element::i8, {rows, width}),
            dense_of<int32_t>(View("row_sums", sums), Element::i32, {rows})};
}

inline RowMap map_of(const char* name, const Optional& index, int64_t rows, int64_t sources) {
    if (index) return {dense_of<const int32_t>(View(name, *index), Element::i32, {rows})};
    in_range("rows of the conditioning tensor", sources, rows, rows);
    return {};
}

constexpr int64_t MAX_IN_FEATURES = 8704, MAX_OUT_FEATURES = int64_t{1} << 24;

inline PackShape pack_shape(int64_t out_features, int64_t in_features, int bits, bool paired) {
    in_range("out_features", out_features, 0, MAX_OUT_FEATURES);
    in_range("in_features", in_features, 1, MAX_IN_FEATURES);
    if (bits != 6 && bits != 8) throw std::invalid_argument("bits is " + std::to_string(bits) + ", expected 6 or 8");
    if (paired && out_features % 2 != 0) throw std::invalid_argument("a paired layer has an even number of channels");
    return {out_features, in_features, bits, paired};
}

inline Cache cache_of(const char* name, const Tensor& tensor, int64_t batch, int64_t heads, int64_t head_dim) {
    const View v(name, tensor);
    v.shape({batch, heads, -1, round_up(head_dim, 16)});
    v.dense(2);
    return {v.as<int8_t>(Element::i8), v.stride(0), v.stride(1), v.size(2), v.size(3)};
}

// The tables and how many groups and slots they have; their data is checked by the caller.
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

void bind_plans(py::module_& m);

}  // namespace ptq
