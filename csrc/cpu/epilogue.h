// What becomes of the exact int32 products, 16 channels of one row at a time.
//
//   acc'   = sum_k q_ik u_jk,  u = w + offset                what the kernels add up
//   acc    = acc' - offset * R_i - zq_i * C_j                int32, exact: R_i the row's sum of codes, C_j the
//   channel's y      = (delta_i * s_j) * float(acc) + b_j              one rounding per operation
//
//   store          out = act(y)
//   quant          q   = Q(act(y))
//   swiglu_quant   q   = Q(silu(y_j) * y_(j + N/2))
//   gate_residual  out = residual + gate_r * y               (residual + y without a gate)
#pragma once

#include "activation.h"
#include "kernels.h"
#include "rowio.h"

namespace ptq::PTQ_NS {

// Constants of one row; offset_sum = offset * R_i.
struct RowTerm {
    float delta;
    int32_t zq, offset_sum;
    int32_t position;
};

inline F dequantize(const Weights& w, const RowTerm& row, int64_t channel, int64_t n, const int32_t* acc) {
    const I correction = set1i(row.offset_sum) +
                         set1i(row.zq) * (n < LANES ? loadi_n(w.col_sums + channel, n) : loadi(w.col_sums + channel));
    const F scale = n < LANES ? load_n(w.scale + channel, n) : load(w.scale + channel);
    const F y = (set1(row.delta) * scale) * to_float(loadi(acc) - correction);
    if (!w.bias) return y;
    return y + (n < LANES ? load_n(w.bias + channel, n) : load(w.bias + channel));
}

// Codes of 16 lanes; false if one of the first n is not finite.
inline bool put_codes(const Epilogue& e, int64_t width, int64_t row, const RowTerm& term, int64_t channel, int64_t n,
                      F y) {
    const I codes = Quantizer(e.out_table.rows[term.position])(y);
    int8_t* out = e.codes.codes + row * width + channel;
    n < LANES ? store_i8_n(out, codes, n) : store_i8(out, codes);
    return all(finite(y));  // lanes beyond n hold 0
}

// n <= 16 channels from `channel` of row `row`; `second` are the products of the channels N/2 further on (swiglu).
inline bool finish(const LinearArgs& args, int64_t row, const RowTerm& term, int64_t channel, int64_t n,
                   const int32_t* acc, const int32_t* second) {
    const Weights& w = args.weights;
    const Epilogue& e = args.epilogue;
    const F y = dequantize(w, term, channel, n, acc);
    switch (e.kind) {
        case Epilogue::Kind::store:
            store(e.out.row(row), e.out.dtype, channel, activate(y, e.activation), n);
            return true;
        case Epilogue::Kind::quant:
            return put_codes(e, w.out_features, row, term, channel, n, activate(y, e.activation));
        case Epilogue::Kind::swiglu_quant: {
            const int64_t half = w.out_features / 2;
            const F gated = activate(y, Activation::silu) * dequantize(w, term, half + channel, n, second);
            return put_codes(e, half, row, term, channel, n, gated);
        }
        case Epilogue::Kind::gate_residual: {
            F update = y;
            if (e.gate.data) {
                update = load(e.gate.row(e.gate_rows.at(row)), e.gate.dtype, channel, n) * y;
            }
            store(e.out.row(row), e.out.dtype, channel,
                  load(e.residual.row(row), e.residual.dtype, channel, n) + update, n);
            return true;
        }
    }
    return true;
}

}  // namespace ptq::PTQ_NS
