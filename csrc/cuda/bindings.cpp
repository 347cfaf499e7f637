// The boundary to Python: tensors arrive as (address, dtype, sizes, strides), the stream as a device and a number. No
// torch header, so that one binary serves every torch release; importing it needs no driver.
//
// Wrong metadata raises here (ValueError, through std::invalid_argument), a launch that fails RuntimeError. Data is in
// the memory of a GPU: nobody looks at it, and kernels clamp what would lead them out of an operand.
#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace ptq::cuda {
namespace {

// Where launches of this process go instead of a GPU. Only the thread that set it uses it, while it is set.
thread_local PyObject* stand_in = nullptr;

void call_stand_in(const Launch& launch) {
    const py::gil_scoped_acquire gil;
    const py::handle callable(stand_in);
    callable(launch.kernel.name, py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]), launch.threads,
             launch.shared, py::bytes(static_cast<const char*>(launch.params), launch.params_bytes), launch.pointers);
}

// replace_launches(callable or None): launches of this thread call it with (name, grid, threads, dynamic shared bytes,
// parameters as bytes, number of pointers at their beginning).
void replace(const py::object& callable) {
    Py_XDECREF(stand_in);
    stand_in = callable.is_none() ? nullptr : callable.inc_ref().ptr();
    replace_launches(stand_in ? &call_stand_in : nullptr);
}

}  // namespace
}  // namespace ptq::cuda

PYBIND11_MODULE(_cuda, m) {
    using namespace ptq::cuda;
    m.doc() = "CUDA kernels. Internal: use ptq4arvg_kernels.";
    m.attr("architectures") = PTQ_CUDA_ARCHITECTURES;
    m.def("runtime_version", &runtime_version);
    m.def("driver_version", &driver_version);
    m.def("replace_launches", &ptq::cuda::replace);
    m.def("kernels", [] {
        std::vector<const char*> names;
        add_row_kernels(names);
        add_gemm_kernels(names);
        add_attention_kernels(names);
        return std::vector<std::string>(names.begin(), names.end());
    });
    bind_operators(m);
    bind_gemm(m);
    bind_attention(m);
    bind_plans(m);
}
