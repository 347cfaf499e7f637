// How host code starts a kernel: one description of a launch, one place that starts it. No CUDA header, so that code
// that plans launches compiles (and is tested) anywhere.
//
// Every kernel is `extern "C" __global__ void NAME(const __grid_constant__ Params)` with one POD parameter. Pointers
// come first in it, and `static constexpr int POINTERS` says how many: a stand-in for the GPU finds and moves them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ptq::cuda {

struct Kernel {
    const char* name = nullptr;      // the entry's name in PTX
    const void* function = nullptr;  // what the runtime calls it
};

struct Launch {
    Kernel kernel;
    unsigned grid[3] = {1, 1, 1};
    unsigned threads = 32;
    unsigned shared = 0;  // dynamic shared memory, bytes
    const void* params = nullptr;
    size_t params_bytes = 0;
    int pointers = 0;  // that many 8-byte pointers at the beginning of the parameters
};

template <typename Params>
Launch launch_of(Kernel kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared,
                 const Params& params) {
    static_assert(sizeof(Params) <= 4096, "kernel parameters are at most 4 KB");
    return {kernel, {x, y, z}, threads, shared, &params, sizeof(Params), Params::POINTERS};
}

// Where a launch goes: a device's current stream, as torch gives it.
struct Stream {
    int device = 0;
    uintptr_t handle = 0;
};

// Starts a kernel, unless its grid is empty. Throws std::runtime_error with the kernel, the sizes and the driver's
// words.
void start(const Launch& launch, const Stream& stream);

// Sends the launches of this thread to `replacement` instead of a GPU; nullptr ends that.
using Replacement = void (*)(const Launch&);
void replace_launches(Replacement replacement);

// 1000 * major + 10 * minor: of the runtime in this module, and of CUDA as the driver knows it (0: there is none).
int runtime_version();
int driver_version();

}  // namespace ptq::cuda
