// What the binding files of the CUDA module share.
#pragma once

#include <vector>

#include "../arguments.h"
#include "launch.h"
#include "operands.h"

namespace ptq::cuda {

// The operands that depend on the kind: rope is [T, d / 2, 2]. Of `h` everything else is filled in.
void finish_heads(HeadOperands& h, const std::optional<View>& rope);

// Kind and vectors of an operator's call; of `h` heads, head_dim and slots are filled in.
void set_vectors(HeadOperands& h, int kind, float eps, const Optional& q_weight, const Optional& q_bias,
                 const Optional& k_weight, const Optional& k_bias, const Optional& q_scale, const Optional& rope);

// A table that kernels read at a clamped index has something to read.
Table filled_table(const char* name, const Tensor& tensor);

int32_t* sums_of(const Optional& sums, int64_t rows);

// Scale and shift [R, width], both or neither, and which of their rows belongs to a row.
struct Modulation {
    Rows scale, shift;
    int64_t count = 0;
    RowMap map;
};
Modulation modulation_of(const Optional& scale, const Optional& shift, const Optional& index, int64_t rows,
                         int64_t width);

// Names of the kernels, for tests and benchmarks.
void add_row_kernels(std::vector<const char*>& names);
void add_gemm_kernels(std::vector<const char*>& names);
void add_attention_kernels(std::vector<const char*>& names);

void bind_operators(py::module_& m);
void bind_gemm(py::module_& m);
void bind_attention(py::module_& m);
void bind_plans(py::module_& m);

}  // namespace ptq::cuda
