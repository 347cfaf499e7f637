#pragma once

namespace ptq {

// Lines of the panels needed next, fetched while the present ones are multiplied: a product of few rows is faster than
// memory, and would otherwise wait for it at the start of every tile.
struct Prefetch {
    const char* next = nullptr;
    int lines = 0;  // per block of 16 k
};

}  // namespace ptq
