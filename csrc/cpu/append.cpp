// qkv_append: split qkv, transform q and k, quantize k and v into their cache slots.
//
// The codes are made in a buffer first and copied into the caches only when every value was finite: a refused call
// leaves the caches as they were.
#include <string.h>

#include "row_math.h"
#include "rows.h"
#include "threads.h"

namespace ptq::PTQ_NS {
namespace {

// x = k or q of one head, `width` floats in whole vectors, replaced by kind(x).
void layer_norm(float* x, int64_t width, Vector weight, Vector bias, float eps) {
    const Normalizer normalized(NormKind::layer, x, width, eps);
    for_vectors(width, [&](int64_t i, int64_t n) {
        F y = normalized(load(x + i));
        if (weight.data) y = y * load(weight.data, weight.dtype, i, n);
        if (bias.data) y = y + load(bias.data, bias.dtype, i, n);
        store(x + i, y);
    });
}

// x / max(|x|, 1e-12) * scale, the factor only for q
void l2(float* x, int64_t width, const float* scale) {
    const float length = __builtin_sqrtf(row_sum(width, [&](int64_t i, int64_t n) {
        const F value = load_part(x + i, n);
        return value * value;
    }));
    const F divisor = max(set1(1e-12f), set1(length));  // this order keeps a NaN
    for_vectors(width, [&](int64_t i, int64_t) {
        const F unit = load(x + i) / divisor;
        store(x + i, scale ? unit * set1(*scale) : unit);
    });
}

// (a, b) -> (a cos - b sin, b cos + a sin) = (a, b) * (cos, cos) + (b, a) * (-sin, sin)
void rotate(float* x, int64_t width, const float* cosines, const float* sines) {
    for_vectors(width, [&](int64_t i, int64_t) {
        const F value = load(x + i);
        store(x + i, value * load(cosines + i) + swap_pairs(value) * load(sines + i));
    });
}

// (cos, sin) of a position, spread to the lanes of rotate; buffers of whole vectors.
void spread_rope(const AppendArgs& args, int64_t position, float* cosines, float* sines) {
    const void* rope =
        static_cast<const char*>(args.rope.data) + position * args.head_dim * dtype_size(args.rope.dtype);
    for_vectors(args.head_dim, [&](int64_t i, int64_t n) { store(cosines + i, load(rope, args.rope.dtype, i, n)); });
    for (int64_t i = 0; i + 1 < args.head_dim; i += 2) {
        const float cosine = cosines[i], sine = cosines[i + 1];
        cosines[i + 1] = cosine;
        sines[i] = -sine;
        sines[i + 1] = sine;
    }
}

// Buffers of one thread, each of padded_lanes(head_dim) floats.
struct Buffers {
    float *x, *cosines, *sines;

    explicit Buffers(int64_t padded) {
        x = static_cast<float*>(thread_scratch(3 * padded * static_cast<int64_t>(sizeof(float))));
        cosines = x + padded;
        sines = cosines + padded;
        memset(x, 0, 3 * static_cast<size_t>(padded) * sizeof(float));
    }
};

class Append {
  public:
    explicit Append(const AppendArgs& args)
        : args_(args), padded_(padded_lanes(args.head_dim)), width_(args.heads * args.head_dim) {}

    int64_t rows() const { return args_.batch * args_.positions.count; }
    int64_t code_bytes() const { return rows() * args_.heads * padded_; }

    // Row of qkv -> q_out, and codes of k and v: [row][head][padded]; false if a value was not finite.
    bool make_codes(int64_t row, int8_t* k_codes, int8_t* v_codes) const {
        const Buffers buffers(padded_);
        const int64_t batch = row / args_.positions.count, p = row % args_.positions.count,
                      position = args_.positions.at(p);
        if (args_.kind == QkKind::rope) spread_rope(args_, position, buffers.cosines, buffers.sines);
        const Grid* k_grids = args_.tables.k + args_.tables.group[position] * args_.heads;
        const Grid* v_grids = args_.tables.v + args_.tables.group[position] * args_.heads;
        bool finite = true;
        for (int64_t head = 0; head < args_.heads; ++head) {
            const int64_t column = head * args_.head_dim, codes = (row * args_.heads + head) * padded_;
            read(row, column, buffers.x);
            transform(head, true, buffers);
            void* q = args_.q_out.row((batch * args_.heads + head) * args_.positions.count + p);
            for_vectors(args_.head_dim,
                        [&](int64_t i, int64_t n) { store(q, args_.q_out.dtype, i, load(buffers.x + i), n); });
            read(row, width_ + column, buffers.x);
            transform(head, false, buffers);
            finite &= put(k_grids[head], buffers.x, k_codes + codes);
            read(row, 2 * width_ + column, buffers.x);
            finite &= put(v_grids[head], buffers.x, v_codes + codes);
        }
        return finite;
    }

    void copy_codes(int64_t row, const int8_t* k_codes, const int8_t* v_codes) const {
        const int64_t batch = row / args_.positions.count, position = args_.positions.of_row(row);
        for (int64_t head = 0; head < args_.heads; ++head) {
            const int64_t codes = (row * args_.heads + head) * padded_;
            copy(k_codes + codes, args_.k.slot(batch, head, position));
            copy(v_codes + codes, args_.v.slot(batch, head, position));
        }
    }

  private:
    void copy(const int8_t* from, int8_t* to) const {
        for (int64_t i = 0; i < padded_; i += LANES) memcpy(to + i, from + i, LANES);
    }

    void read(int64_t row, int64_t column, float* x) const {
        for_vectors(args_.head_dim, [&](int64_t i, int64_t n) {
            store(x + i, load(args_.qkv.row(row), args_.qkv.dtype, column + i, n));
        });
    }

    void transform(int64_t head, bool is_q, const Buffers& buffers) const {
        switch (args_.kind) {
            case QkKind::none:
                return;
            case QkKind::layer_norm:
                return layer_norm(buffers.x, args_.head_dim, is_q ? args_.q_weight : args_.k_weight,
                                  is_q ? args_.q_bias : args_.k_bias, args_.eps);
            case QkKind::l2: {
                const float scale = scalar(args_.q_scale, head);
                return l2(buffers.x, args_.head_dim, is_q ? &scale : nullptr);
            }
            case QkKind::rope:
                return rotate(buffers.x, args_.head_dim, buffers.cosines, buffers.sines);
        }
    }

    static float scalar(Vector v, int64_t i) {
        float lanes[LANES];
        store(lanes, load(v.data, v.dtype, i, 1));
        return lanes[0];
    }

    // Codes of one head, with zeros in the padding lanes.
    bool put(const Grid& grid, const float* x, int8_t* codes) const {
        CodeWriter out(grid, codes);
        for_vectors(args_.head_dim, [&](int64_t i, int64_t n) { out.put(i, n, load(x + i)); });
        memset(codes + args_.head_dim, 0, static_cast<size_t>(padded_ - args_.head_dim));
        return out.finite();
    }

    const AppendArgs& args_;
    int64_t padded_, width_;
};

}  // namespace

Status qkv_append(const AppendArgs& args, int threads) {
    const Append append(args);
    const int64_t rows = append.rows();
    if (rows == 0 || args.heads == 0) return Status::ok;
    if (rows * args.heads * args.head_dim < SERIAL_VALUES) threads = 1;
    int8_t* k_codes = static_cast<int8_t*>(call_scratch(2 * append.code_bytes()));
    int8_t* v_codes = k_codes + append.code_bytes();
    Flag not_finite;
    parallel(threads, rows, [&](int64_t row) {
        if (!append.make_codes(row, k_codes, v_codes)) not_finite.raise();
    });
    if (not_finite.status() != Status::ok) return Status::not_finite;
    parallel(threads, rows, [&](int64_t row) { append.copy_codes(row, k_codes, v_codes); });
    return Status::ok;
}

}  // namespace ptq::PTQ_NS
