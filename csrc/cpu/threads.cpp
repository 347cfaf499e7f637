#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace ptq {
namespace {

struct Loop {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    Body body;
    void* context;
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // of the first task that threw; read after the team has met

    Loop(int64_t tasks, Body body, void* context) : tasks(tasks), body(body), context(context) {}
};

// An exception must not leave a thread of the team: it is kept, and thrown where the loop was called.
void run(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    for (int64_t task; (task = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) {
        try {
            loop.body(loop.context, task);
        } catch (...) {
            if (!loop.failed.exchange(true)) loop.error = std::current_exception();
            loop.next.store(loop.tasks, std::memory_order_relaxed);
        }
    }
}

// GOMP_parallel(function, data, threads, flags) is the entry point every OpenMP runtime on Linux offers (LLVM's and
// Intel's under the same name). Looked up when first needed, in what the process has loaded, it is the runtime of
// torch: its threads are ours too, and no second pool competes with them for the cores.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
#if defined(__unix__) || defined(__APPLE__)
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

GompParallel gomp() {
    static const GompParallel found = find_gomp();
    return found;
}

// Waiting for something that another running thread is about to do. After a while the processor is offered to others:
// that thread may not be running.
class Wait {
  public:
    void once() {
        if (++spins_ > 2000) {
            std::this_thread::yield();
            return;
        }
#if defined(__x86_64__) || defined(_M_X64)
        _mm_pause();
#endif
    }

  private:
    int spins_ = 0;
};

// A team that stays together over many loops (with_team). The owner publishes a loop, takes part in it, withdraws it
// and waits for those who are inside; a helper that never arrives is not waited for.
//
// A helper first says that it is inside and then looks at the loop; the owner first withdraws the loop and then looks
// who is inside. In any order of the four (sequentially consistent) accesses, either the helper finds no loop or the
// owner waits for it: a loop is never left while in use.
struct Team {
    std::atomic<Loop*> loop{nullptr};
    std::atomic<uint64_t> published{0};  // loops so far
    std::atomic<int> inside{0};
    std::atomic<bool> done{false};
    std::thread::id owner = std::this_thread::get_id();
    void (*scope)(void*) = nullptr;
    void* context = nullptr;
    std::exception_ptr error;

    void serve() {
        Wait idle;
        while (!done.load(std::memory_order_acquire)) {
            if (!loop.load(std::memory_order_relaxed)) {
                idle.once();
                continue;
            }
            const uint64_t seen = published.load(std::memory_order_relaxed);
            inside.fetch_add(1);
            Loop* const found = loop.load();
            if (found) run(found);
            inside.fetch_sub(1);
            if (!found) continue;
            // All tasks are handed out: until the next loop there is nothing to do.
            Wait next;
            while (published.load(std::memory_order_relaxed) == seen && !done.load(std::memory_order_relaxed))
                next.once();
            idle = Wait();
        }
    }

    void run_loop(Loop& mine) {
        published.fetch_add(1, std::memory_order_relaxed);
        loop.store(&mine);
        run(&mine);
        loop.store(nullptr);
        Wait others;
        while (inside.load() != 0) others.once();
    }
};

thread_local Team* current_team = nullptr;

void enter_team(void* data) {
    Team& team = *static_cast<Team*>(data);
    if (std::this_thread::get_id() != team.owner) return team.serve();
    current_team = &team;
    try {
        team.scope(team.context);
    } catch (...) {
        team.error = std::current_exception();
    }
    current_team = nullptr;
    team.done.store(true, std::memory_order_release);
}

// The team used where no OpenMP runtime is loaded. Workers sleep between loops.
class Pool {
  public:
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    void run_loop(int threads, Loop& loop) {
        std::unique_lock<std::mutex> one_loop(busy_, std::try_to_lock);
        if (!one_loop.owns_lock()) return run(&loop);  // another thread of the program is using the team
        const size_t helpers = static_cast<size_t>(threads - 1);
        while (workers_.size() < helpers) workers_.emplace_back(&Pool::work, this, workers_.size());
        {
            std::lock_guard<std::mutex> lock(mutex_);
            loop_ = &loop;
            wanted_ = helpers;
            running_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        run(&loop);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return running_ == 0; });
    }

  private:
    void work(size_t index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stop_ || (generation_ != seen && index < wanted_); });
            if (stop_) return;
            seen = generation_;
            Loop* loop = loop_;
            lock.unlock();
            run(loop);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Loop* loop_ = nullptr;
    size_t wanted_ = 0, running_ = 0;
    uint64_t generation_ = 0;
    bool stop_ = false;
};

std::atomic<bool> use_gomp{true};

class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    void* at_least(int64_t bytes) {
        if (!enough(bytes)) {
            const int64_t size = (bytes + STEP - 1) / STEP * STEP;
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            if (posix_memalign(&data_, 64, static_cast<size_t>(size)) != 0) throw std::bad_alloc();
            size_ = size;
        }
        return data_;
    }

  private:
#if defined(PTQ_DEBUG)
    // Exactly what was asked for, so that the sanitizers see an access behind it.
    static constexpr int64_t STEP = 1;
    bool enough(int64_t bytes) const { return data_ && bytes == size_; }
#else
    static constexpr int64_t STEP = 4096;
    bool enough(int64_t bytes) const { return bytes <= size_; }
#endif

    void* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace

void parallel_for(int threads, int64_t tasks, Body body, void* context) {
    Loop loop(tasks, body, context);
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        run(&loop);
    } else if (current_team) {
        current_team->run_loop(loop);
    } else if (use_gomp && gomp()) {
        gomp()(run, &loop, static_cast<unsigned>(threads), 0);
    } else {
        static Pool pool;
        pool.run_loop(threads, loop);
    }
    if (loop.failed) std::rethrow_exception(loop.error);
}

void with_team(int threads, void (*scope)(void* context), void* context) {
    if (threads <= 1 || current_team || !use_gomp || !gomp()) return scope(context);
    Team team;
    team.scope = scope;
    team.context = context;
    gomp()(enter_team, &team, static_cast<unsigned>(threads), 0);
    if (team.error) std::rethrow_exception(team.error);
}

void* thread_scratch(int64_t bytes) {
    static thread_local Scratch scratch;
    return scratch.at_least(bytes);
}

void* call_scratch(int64_t bytes) {
    static thread_local Scratch scratch;
    return scratch.at_least(bytes);
}

void* block_scratch(int64_t bytes) {
    static thread_local Scratch scratch;
    return scratch.at_least(bytes);
}

const char* thread_team() {
    return use_gomp && gomp() ? "GOMP" : "std::thread";
}

bool set_thread_team(bool wanted) {
    if (wanted && !gomp()) return false;
    use_gomp = wanted;
    return true;
}

}  // namespace ptq
