// What the row operators share: loops over a row, sums, normalization, codes.
//
// Every result depends on its own row only. A row's last, incomplete vector goes through the same lane operations as
// the others, with 0 in the lanes that do not exist.
#pragma once

#include "kernels.h"
#include "rowio.h"

namespace ptq::PTQ_NS {

constexpr int64_t SERIAL_VALUES = 32768;  // below, waking the team costs more than it saves

inline int64_t padded_lanes(int64_t width) {
    return ceil_div(width, LANES) * LANES;
}

inline Mask first_lanes(int64_t n) {
    constexpr float index[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return less(load(index), set1(static_cast<float>(n)));
}

inline F keep_first(F a, int64_t n) {
    return n < LANES ? select(first_lanes(n), a, set1(0.0f)) : a;
}

// visit(i, n) for the vectors of a row: n lanes from element i on. n is the constant 16 in the loop.
template <typename Visit>
inline void for_vectors(int64_t width, const Visit& visit) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) visit(i, LANES);
    if (i < width) visit(i, width - i);
}

// Sum over a row of the values term(i, n) gives: 64 partial sums, then their tree.
template <typename Term>
inline float row_sum(int64_t width, const Term& term) {
    F part[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) {
        for (int k = 0; k < 4; ++k) part[k] = part[k] + term(i + k * LANES, LANES);
    }
    for (; i + LANES <= width; i += LANES) part[0] = part[0] + term(i, LANES);
    if (i < width) part[1] = part[1] + term(i, width - i);
    return sum((part[0] + part[1]) + (part[2] + part[3]));
}

inline F load_part(const float* p, int64_t n) {
    return n < LANES ? load_n(p, n) : load(p);
}

// A row as float32: in place if it is that already, else converted into `buffer` (a multiple of 16 lanes).
inline const float* as_floats(const void* row, DType dtype, int64_t width, float* buffer) {
    if (dtype == DType::f32) return static_cast<const float*>(row);
    for_vectors(width, [&](int64_t i, int64_t n) { store(buffer + i, load(row, dtype, i, n)); });
    return buffer;
}

// layer: c = x - mean(x), c / sqrt(mean(c^2) + eps);  rms: x / sqrt(mean(x^2) + eps)
struct Normalizer {
    F mean, factor;

    Normalizer(NormKind kind, const float* x, int64_t width, float eps) {
        const float count = static_cast<float>(width);
        const auto value = [&](int64_t i, int64_t n) { return load_part(x + i, n); };
        mean = set1(kind == NormKind::layer ? row_sum(width, value) / count : 0.0f);
        const float squares = row_sum(width, [&](int64_t i, int64_t n) {
            const F centred = keep_first(load_part(x + i, n) - mean, n);
            return centred * centred;
        });
        factor = set1(1.0f / __builtin_sqrtf(squares / count + eps));
    }

    F operator()(F x) const { return (x - mean) * factor; }
};

// Codes of one row; afterwards its sum, and whether all values were finite.
class CodeWriter {
  public:
    CodeWriter(const Grid& grid, int8_t* out) : quantizer_(grid), out_(out) {}

    void put(int64_t i, int64_t n, F y) {
        if (n < LANES) return put_last(i, n, y);
        const I codes = quantizer_(y);
        store_i8(out_ + i, codes);
        sum_ = sum_ + codes;
        poison_ = fma(y, set1(0.0f), poison_);
    }

    int32_t code_sum() const { return sum(sum_); }
    bool finite() const { return all(PTQ_NS::finite(poison_)); }

  private:
    void put_last(int64_t i, int64_t n, F y) {
        store_i8_n(out_ + i, quantizer_(y), n);
        sum_ = sum_ + load_i8_n(out_ + i, n);
        poison_ = fma(keep_first(y, n), set1(0.0f), poison_);
    }

    Quantizer quantizer_;
    int8_t* out_;
    I sum_ = set1i(0);
    F poison_ = set1(0.0f);  // 0 * infinity and 0 * NaN are NaN, and stay so in a sum
};

// Whether anything not finite was met, by any thread.
class Flag {
  public:
    void raise() { __atomic_store_n(&raised_, true, __ATOMIC_RELAXED); }
    Status status() const { return __atomic_load_n(&raised_, __ATOMIC_RELAXED) ? Status::not_finite : Status::ok; }

  private:
    bool raised_ = false;
};

}  // namespace ptq::PTQ_NS
