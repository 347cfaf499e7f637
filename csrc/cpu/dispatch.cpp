#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace ptq {
namespace {

#if defined(PTQ_X86)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#if defined(PTQ_EMULATE_AVX512)
bool has_avx512vnni() {
    return true;
}
#else
bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif
const InstructionSet sets[INSTRUCTION_SETS] = {
    {"avx512vnni", kernels_avx512vnni(), has_avx512vnni()},
    {"avx2", kernels_avx2(), has_avx2()},
    {"portable", kernels_portable(), true},
};
#else
const InstructionSet sets[INSTRUCTION_SETS] = {
    {"avx512vnni", nullptr, false}, {"avx2", nullptr, false}, {"portable", kernels_portable(), true}};
#endif

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const InstructionSet* instruction_sets() {
    return sets;
}

const Kernels& kernels() {
    const Kernels* now = selected.load(std::memory_order_relaxed);
    if (now) return *now;
    for (const InstructionSet& set : sets) {
        if (set.usable()) return *set.kernels;
    }
    return *kernels_portable();
}

bool select(const char* name) {
    for (const InstructionSet& set : sets) {
        if (std::strcmp(set.name, name) == 0 && set.usable()) {
            selected = set.kernels;
            return true;
        }
    }
    return false;
}

}  // namespace ptq
