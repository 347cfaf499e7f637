// Copies from global to shared memory that registers take no part in (cp.async), 16 bytes per lane.
#pragma once

#include <cstdint>

namespace ptq::cuda {

// What the second-level cache should do with lines that are read once, or more often.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t evict_normal() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes from source + FROM to target + TO.
template <int TO, int FROM>
__device__ __forceinline__ void copy16(uint32_t target, const void* source, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0 + %3], [%1 + %4], 16, %2;" ::"r"(target), "l"(source),
                 "l"(policy), "n"(TO), "n"(FROM)
                 : "memory");
}
// `bytes` of 16, zeros behind them; with 0 bytes the source is not read.
template <int TO, int FROM>
__device__ __forceinline__ void copy16_or_zero(uint32_t target, const void* source, uint32_t bytes, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0 + %4], [%1 + %5], 16, %2, %3;" ::"r"(target),
                 "l"(source), "r"(bytes), "l"(policy), "n"(TO), "n"(FROM)
                 : "memory");
}
template <int TO, int FROM>
__device__ __forceinline__ void copy16_or_zero(uint32_t target, const void* source, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;" ::"r"(target), "l"(source), "r"(bytes),
                 "n"(TO), "n"(FROM)
                 : "memory");
}
// The same for the threads that want it, without a branch.
template <int TO, int FROM>
__device__ __forceinline__ void copy16_or_zero_if(bool wanted, uint32_t target, const void* source, uint32_t bytes) {
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n"
        "@wanted cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;\n}" ::"r"(target),
        "l"(source), "r"(bytes), "n"(TO), "n"(FROM), "r"(static_cast<uint32_t>(wanted))
        : "memory");
}

// Ends a group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most PENDING of this thread's newest groups are on their way. What others copied needs a barrier.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace ptq::cuda
