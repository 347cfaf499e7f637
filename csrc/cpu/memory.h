// Large buffers on large pages where the system has them: streaming through small pages costs about a tenth of the
// bandwidth in address translation.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace ptq {

constexpr int64_t LARGE_PAGE = 2 << 20;

// Asks for large pages in [data, data + bytes), before it is written to. Without effect where they are not available.
inline void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + 4095) / 4096 * 4096;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / 4096 * 4096;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

// Hands freed memory back to the system. glibc keeps what lies between blocks in use, which adds up to more than a
// model when tensors of many sizes come and go, as they do while weights are rewritten.
inline void release_freed_memory() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

class LargeBuffer {
  public:
    explicit LargeBuffer(int64_t bytes) {
        const int64_t rounded = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
        data_ = static_cast<uint8_t*>(std::aligned_alloc(LARGE_PAGE, static_cast<size_t>(rounded)));
        if (!data_) throw std::bad_alloc();
        advise_large_pages(data_, rounded);
    }
    ~LargeBuffer() { std::free(data_); }
    LargeBuffer(const LargeBuffer&) = delete;
    LargeBuffer& operator=(const LargeBuffer&) = delete;

    uint8_t* data() const { return data_; }

  private:
    uint8_t* data_;
};

}  // namespace ptq
