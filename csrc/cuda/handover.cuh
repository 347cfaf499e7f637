// Thread blocks that hand partial results to the last of them.
//
// Memory order (PTX ISA, memory consistency model):
// 1. the threads of a block store partial results, each issues a fence, then they meet at a barrier;
// 2. one thread adds 1 to the counter of what they share; whoever sees this addition, and issues a fence itself, sees
//    the stores of step 1;
// 3. a fence, and a barrier that gives the counter's old value to all threads: if it says that all others have been
//    here, their partial results can be read. They are read from the second-level cache (__ldcg): the first level may
//    hold a line of an earlier launch;
// 4. the last block sets the counter back to 0 for the next launch.
#pragma once

#include <cstdint>

namespace ptq::cuda {

// Whether this block is the last of `blocks`. Called by all threads after their stores; `flag` is shared memory that
// nobody uses meanwhile.
__device__ __forceinline__ bool arrive_last(unsigned int* counter, unsigned int blocks, unsigned int* flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned int arrived = atomicAdd(counter, 1u);
        __threadfence();
        const bool last = arrived == blocks - 1;
        if (last) *counter = 0;
        *flag = last;
    }
    __syncthreads();
    return *flag != 0;
}

}  // namespace ptq::cuda
