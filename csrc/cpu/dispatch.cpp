#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(PTQ_X86) && defined(__linux__) && !defined(PTQ_EMULATE_AVX512)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(PTQ_EMULATE_AVX512)
bool has_amx() {
    return true;
}
#elif defined(__linux__)
// CPUID leaf 7 names AMX-TILE and AMX-INT8; a process has to ask Linux for the tile registers, once.
bool has_amx() {
    constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25;
    constexpr long REQUEST_FEATURE = 0x1023, TILE_DATA = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & TILE) == 0 || (d & INT8) == 0) return false;
    return syscall(SYS_arch_prctl, REQUEST_FEATURE, TILE_DATA) == 0;
}
#else
bool has_amx() {
    return false;
}
#endif
#if defined(PTQ_NO_AMX)
const Kernels* kernels_amx_or_none() {
    return nullptr;
}
#else
const Kernels* kernels_amx_or_none() {
    return kernels_amx();
}
#endif
const InstructionSet sets[INSTRUCTION_SETS] = {
    {"amx", kernels_amx_or_none(), has_amx()},
    {"avx512vnni", kernels_avx512vnni(), has_avx512vnni()},
    {"avx2", kernels_avx2(), has_avx2()},
    {"portable", kernels_portable(), true},
};
#else
const InstructionSet sets[INSTRUCTION_SETS] = {{"amx", nullptr, false},
                                               {"avx512vnni", nullptr, false},
                                               {"avx2", nullptr, false},
                                               {"portable", kernels_portable(), true}};
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
