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

// Constants of the n <= 16 channels from `first`: loaded once, used for all rows of a tile.
struct Channels {
    int64_t first, n;
    I col_sums;
    F scale, bias;
    bool biased;

    Channels(const Weights& w, int64_t first, int64_t n)
        : first(first),
          n(n),
          col_sums(n < LANES ? loadi_n(w.col_sums + first, n) : loadi(w.col_sums + first)),
          scale(n < LANES ? load_n(w.scale + first, n) : load(w.scale + first)),
          bias(set1(0)),
          biased(w.bias != nullptr) {
        if (biased) bias = n < LANES ? load_n(w.bias + first, n) : load(w.bias + first);
    }
    F dequantize(const RowTerm& row, const int32_t* acc) const {
        const I exact = loadi(acc) - (set1i(row.offset_sum) + set1i(row.zq) * col_sums);
        const F y = (set1(row.delta) * scale) * to_float(exact);
        return biased ? y + bias : y;
    }
};

// Codes of 16 lanes, `width` per row of the output; false if one of them is not finite (lanes beyond n hold 0).
inline bool put_codes(const Epilogue& e, int64_t width, int64_t row, const RowTerm& term, const Channels& c, F y) {
    const I codes = Quantizer(e.out_table.rows[term.position])(y);
    int8_t* out = e.codes.codes + row * width + c.first;
    c.n < LANES ? store_i8_n(out, codes, c.n) : store_i8(out, codes);
    return all(finite(y));
}

// Sums of the rows [row, row + rows) of one panel, `stride` apart in `acc`; those of its partner in `second` (swiglu).
// False if a value to be quantized is not finite.
inline bool finish(const LinearArgs& args, const RowTerm* terms, int64_t row, int64_t rows, int64_t channel, int64_t n,
                   const int32_t* acc, const int32_t* second, int64_t stride) {
    const Epilogue e = args.epilogue;  // a copy: no store through a pointer can change it, so it stays in registers
    const int64_t out_features = args.weights.out_features, half = out_features / 2, end = row + rows;
    const Channels c(args.weights, channel, n);
    bool good = true;
    terms += row;
    switch (e.kind) {
        case Epilogue::Kind::store:
            for (; row < end; ++row, ++terms, acc += stride) {
                store(e.out.row(row), e.out.dtype, channel, activate(c.dequantize(*terms, acc), e.activation), n);
            }
            break;
        case Epilogue::Kind::quant:
            for (; row < end; ++row, ++terms, acc += stride) {
                good &= put_codes(e, out_features, row, *terms, c, activate(c.dequantize(*terms, acc), e.activation));
            }
            break;
        case Epilogue::Kind::swiglu_quant: {
            const Channels partner(args.weights, half + channel, n);
            for (; row < end; ++row, ++terms, acc += stride, second += stride) {
                const F gated = activate(c.dequantize(*terms, acc), Activation::silu);
                good &= put_codes(e, half, row, *terms, c, gated * partner.dequantize(*terms, second));
            }
            break;
        }
        case Epilogue::Kind::gate_residual:
            for (; row < end; ++row, ++terms, acc += stride) {
                F update = c.dequantize(*terms, acc);
                if (e.gate.data) update = load(e.gate.row(e.gate_rows.at(row)), e.gate.dtype, channel, n) * update;
                store(e.out.row(row), e.out.dtype, channel,
                      load(e.residual.row(row), e.residual.dtype, channel, n) + update, n);
            }
            break;
    }
    return good;
}

}  // namespace ptq::PTQ_NS
