// The instruction sets of this build and this machine, best first.
#pragma once

#include "kernels.h"

namespace ptq {

struct InstructionSet {
    const char* name;
    const Kernels* kernels;  // nullptr: not compiled in
    bool supported;          // by this machine

    bool usable() const { return kernels != nullptr && supported; }
};

constexpr int INSTRUCTION_SETS = 4;
const InstructionSet* instruction_sets();

// The kernels in use: the best usable set, until select() names another. select() returns false for a set that is
// unknown or not usable.
const Kernels& kernels();
bool select(const char* name);

}  // namespace ptq
