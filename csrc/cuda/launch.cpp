#include "launch.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace ptq::cuda {
namespace {

thread_local Replacement replaced = nullptr;

// More dynamic shared memory than this must be asked for, once per kernel and device.
constexpr unsigned SHARED_WITHOUT_ASKING = 48 * 1024;

[[noreturn]] void fail(const Launch& launch, const Stream& stream, cudaError_t error) {
    cudaGetLastError();  // the next launch starts without this error
    const std::string grid =
        std::to_string(launch.grid[0]) + "x" + std::to_string(launch.grid[1]) + "x" + std::to_string(launch.grid[2]);
    throw std::runtime_error("cannot start " + std::string(launch.kernel.name) + " on device " +
                             std::to_string(stream.device) + " (" + grid + " blocks of " +
                             std::to_string(launch.threads) + " threads, " + std::to_string(launch.shared) +
                             " bytes of dynamic shared memory): " + cudaGetErrorString(error));
}

// The device of a launch is the current one as long as this lives; torch finds its own again afterwards.
class OnDevice {
  public:
    OnDevice(const Launch& launch, const Stream& stream) {
        cudaError_t error = cudaGetDevice(&before_);
        if (error == cudaSuccess && before_ != stream.device) {
            error = cudaSetDevice(stream.device);
            changed_ = error == cudaSuccess;
        }
        if (error != cudaSuccess) fail(launch, stream, error);
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

void allow_shared(const Launch& launch, const Stream& stream) {
    static std::mutex lock;
    static std::map<std::pair<const void*, int>, unsigned> allowed;  // the most that was asked for so far
    const std::lock_guard<std::mutex> guard(lock);
    unsigned& most = allowed[{launch.kernel.function, stream.device}];
    if (most >= launch.shared) return;
    const cudaError_t error = cudaFuncSetAttribute(launch.kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(launch.shared));
    if (error != cudaSuccess) fail(launch, stream, error);
    most = launch.shared;
}

}  // namespace

void start(const Launch& launch, const Stream& stream) {
    if (launch.grid[0] == 0 || launch.grid[1] == 0 || launch.grid[2] == 0) return;
    if (replaced) {
        replaced(launch);
        return;
    }
    const OnDevice guard(launch, stream);
    if (launch.shared > SHARED_WITHOUT_ASKING) allow_shared(launch, stream);
    void* arguments[] = {const_cast<void*>(launch.params)};
    const cudaError_t error =
        cudaLaunchKernel(launch.kernel.function, dim3(launch.grid[0], launch.grid[1], launch.grid[2]),
                         dim3(launch.threads), arguments, launch.shared, reinterpret_cast<cudaStream_t>(stream.handle));
    if (error != cudaSuccess) fail(launch, stream, error);
}

void replace_launches(Replacement replacement) {
    replaced = replacement;
}

int runtime_version() {
    return CUDART_VERSION;
}

int driver_version() {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
    return version;
}

}  // namespace ptq::cuda
