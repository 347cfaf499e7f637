// quantize and adaln_quant: one row at a time, from first-level cache after its first reading.
#include "activation.h"
#include "row_math.h"
#include "rows.h"
#include "threads.h"

namespace ptq::PTQ_NS {
namespace {

// body(row) for all rows, several rows to a task.
template <typename RowBody>
void for_rows(int64_t rows, int64_t width, int threads, const RowBody& body) {
    if (rows * width < SERIAL_VALUES) threads = 1;
    const int64_t per_task = smaller(rows, 1 + 8192 / (width + 1));
    if (rows == 0) return;
    parallel(threads, ceil_div(rows, per_task), [&](int64_t task) {
        const int64_t end = smaller(rows, (task + 1) * per_task);
        for (int64_t row = task * per_task; row < end; ++row) body(row);
    });
}

// The activation is a constant of the loop, so that its coefficients stay in registers.
template <Activation activation>
Status quantize_rows(const QuantizeArgs& args, int threads) {
    Flag not_finite;
    for_rows(args.rows, args.width, threads, [&](int64_t row) {
        const void* x = args.x.row(row);
        CodeWriter out(args.table.rows[args.positions.of_row(row)], args.out.codes + row * args.width);
        for_vectors(args.width,
                    [&](int64_t i, int64_t n) { out.put(i, n, activate(load(x, args.x.dtype, i, n), activation)); });
        args.out.sums[row] = out.code_sum();
        if (!out.finite()) not_finite.raise();
    });
    return not_finite.status();
}

}  // namespace

Status quantize(const QuantizeArgs& args, int threads) {
    switch (args.activation) {
        case Activation::none:
            return quantize_rows<Activation::none>(args, threads);
        case Activation::silu:
            return quantize_rows<Activation::silu>(args, threads);
        case Activation::gelu_erf:
            return quantize_rows<Activation::gelu_erf>(args, threads);
        case Activation::gelu_tanh:
            return quantize_rows<Activation::gelu_tanh>(args, threads);
    }
    return Status::ok;
}

Status adaln_quant(const AdalnArgs& args, int threads) {
    Flag not_finite;
    const int64_t buffer_bytes = padded_lanes(args.width) * static_cast<int64_t>(sizeof(float));
    for_rows(args.rows, args.width, threads, [&](int64_t row) {
        float* buffer = static_cast<float*>(thread_scratch(buffer_bytes));
        const float* x = as_floats(args.x.row(row), args.x.dtype, args.width, buffer);
        const int64_t r = args.modulation.at(row);
        const void *scale = args.scale.data ? args.scale.row(r) : nullptr, *shift = scale ? args.shift.row(r) : nullptr;
        const Normalizer normalized(args.norm, x, args.width, args.eps);
        const F offset = set1(args.offset);
        CodeWriter out(args.table.rows[args.positions.of_row(row)], args.out.codes + row * args.width);
        for_vectors(args.width, [&](int64_t i, int64_t n) {
            F y = normalized(load_part(x + i, n));
            if (args.weight.data) y = y * load(args.weight.data, args.weight.dtype, i, n);
            if (args.bias.data) y = y + load(args.bias.data, args.bias.dtype, i, n);
            if (scale) {
                y = y * (offset + load(scale, args.scale.dtype, i, n)) + load(shift, args.shift.dtype, i, n);
            }
            out.put(i, n, y);
        });
        args.out.sums[row] = out.code_sum();
        if (!out.finite()) not_finite.raise();
    });
    return not_finite.status();
}

}  // namespace ptq::PTQ_NS
