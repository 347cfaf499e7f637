// Operands of the CPU kernels from what Python hands over, and what its two binding files share.
#pragma once

#include <string>

#include "arguments.h"
#include "cpu/checks.h"
#include "cpu/pack.h"

namespace ptq {

constexpr int OK = 0, BAD_DATA = 1;

inline int checked_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected at least 1");
    return threads;
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

inline PackShape pack_shape(int64_t out_features, int64_t in_features, int bits, bool paired) {
    in_range("out_features", out_features, 0, MAX_OUT_FEATURES);
    in_range("in_features", in_features, 1, MAX_IN_FEATURES);
    if (bits != 6 && bits != 8) throw std::invalid_argument("bits is " + std::to_string(bits) + ", expected 6 or 8");
    if (paired && out_features % 2 != 0) throw std::invalid_argument("a paired layer has an even number of channels");
    return {out_features, in_features, bits, paired};
}

void bind_plans(py::module_& m);

}  // namespace ptq
