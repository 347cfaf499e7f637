// Parallel loops on torch's own OpenMP team, so that never more than torch.get_num_threads() threads are busy.
#pragma once

#include <cstdint>

namespace ptq {

// Products (multiply-adds) below which waking the team costs more than it saves.
constexpr int64_t SERIAL_PRODUCTS = 1 << 17;

using Body = void (*)(void* context, int64_t task);

// Calls body(context, task) once for every task in [0, tasks), on at most `threads` threads; the tasks are handed out
// in order, whichever thread is free. Returns when all are done. Not to be nested.
void parallel_for(int threads, int64_t tasks, Body body, void* context);

// The same with a callable: for (task) f(task).
template <typename Function>
void parallel(int threads, int64_t tasks, const Function& function) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t task = 0; task < tasks; ++task) function(task);
        return;
    }
    parallel_for(
        threads, tasks, [](void* context, int64_t task) { (*static_cast<const Function*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&function)));
}

// Calls scope(context) with a team that stays together for all parallel loops of this thread inside it. A loop then
// costs a fraction of a microsecond instead of waking and gathering the team, and on a busy machine it does not wait
// for a thread that got no processor: whoever is running does the tasks.
void with_team(int threads, void (*scope)(void* context), void* context);

template <typename Function>
void team(int threads, const Function& function) {
    with_team(
        threads, [](void* context) { (*static_cast<const Function*>(context))(); },
        const_cast<void*>(static_cast<const void*>(&function)));
}

// 64-byte aligned memory of this thread. Each kind is one buffer, reused by later calls, which invalidates what an
// earlier one returned: the first for the body of a task, the second for a kernel around its parallel loops, the third
// for a block around its kernels. They grow and are never handed back: after warm-up nothing is allocated. They throw
// std::bad_alloc.
void* thread_scratch(int64_t bytes);
void* call_scratch(int64_t bytes);
void* block_scratch(int64_t bytes);

// What runs the loops: "GOMP" (the OpenMP runtime that torch loaded) or "std::thread", where there is none. Tests
// choose with set_thread_team, which returns false for a team that does not exist here.
const char* thread_team();
bool set_thread_team(bool gomp);

}  // namespace ptq
