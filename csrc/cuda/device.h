// What plans know of a GPU. No CUDA header: a plan is a pure function, tested without a GPU.
#pragma once

namespace ptq::cuda {

struct DeviceInfo {
    int capability = 80;  // 10 * major + minor
    int multiprocessors = 1;
    int shared_bytes = 48 * 1024;  // most a thread block may have, after asking for it
};

}  // namespace ptq::cuda
