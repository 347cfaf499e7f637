// Integer linear layer: products, exact correction and epilogue. The products themselves are in gemm_<isa>.h.
//
// Few rows (direct_limit): each thread streams panels once and unpacks them in registers; memory is the limit.
// More rows: a tile's panels are unpacked once into the thread's cache and multiplied with all rows of a chunk, a few
// rows at a time, while the panels of the next tile are prefetched.
#include "gemm.h"

#include "codes.h"
#include "epilogue.h"
#include "pack.h"
#include "prefetch.h"
#include "threads.h"

#if defined(PTQ_ISA_AMX)
#include "gemm_amx.h"
#elif defined(PTQ_ISA_AVX512VNNI)
#include "gemm_avx512.h"
#elif defined(PTQ_ISA_AVX2)
#include "gemm_avx2.h"
#else
#include "gemm_portable.h"
#endif

namespace ptq::PTQ_NS {
namespace {

// One call: the operands in the form the products want, and the constants of the rows.
struct Call {
    const LinearArgs& args;
    const int8_t* a;    // activations, K padded
    int64_t row_bytes;  // from one row of `a` to the next (interleaved: per row of a group)
    bool interleaved;
    const RowTerm* terms;
    int64_t padded, panel_size;
    int64_t half;        // panels of one half of a paired layer; all panels of another
    int not_finite = 0;  // set by any thread. No std::atomic here: see types.h

    const uint8_t* panel(int64_t index) const { return args.weights.panels + index * panel_size; }
};

void row_terms(const LinearArgs& args, RowTerm* terms) {
    const int32_t offset = weight_offset(args.weights.bits);
    for (int64_t row = 0, p = 0; row < args.rows; ++row) {
        const int64_t position = args.positions.at(p);
        const Grid& grid = args.table.rows[position];
        terms[row] = {grid.delta, static_cast<int32_t>(grid.zq), offset * args.row_sums[row],
                      static_cast<int32_t>(position)};
        if (++p == args.positions.count) p = 0;
    }
}

// Epilogue of `rows` rows of the panels [first, first + count); acc is [rows][stride], panel p of the first half at
// 16 * (p - first), its partner in the second half `count` panels further on.
void finish_rows(Call& call, int64_t row0, int64_t rows, int64_t first, int64_t count, const int32_t* acc,
                 int64_t stride) {
    const int64_t width =
        call.args.weights.paired ? call.args.weights.out_features / 2 : call.args.weights.out_features;
    bool finite = true;
    for (int64_t p = 0; p < count; ++p) {
        const int64_t channel = (first + p) * PANEL;
        finite &= finish(call.args, call.terms, row0, rows, channel, smaller(PANEL, width - channel), acc + p * PANEL,
                         acc + (count + p) * PANEL, stride);
    }
    if (!finite) __atomic_store_n(&call.not_finite, 1, __ATOMIC_RELAXED);
}

void run_direct(Call& call, int threads) {
    const LinearArgs& args = call.args;
    const int halves = args.weights.paired ? 2 : 1;
    const int64_t tasks = threads > 1 ? smaller(call.half, 8 * threads) : 1;
    const int64_t groups = ceil_div(args.rows, DIRECT_GROUP);
    parallel(threads, tasks, [&](int64_t task) {
        alignas(64) int32_t acc[DIRECT_GROUP * 2 * PANEL];
        const int64_t stride = halves * PANEL;
        for (int64_t p = call.half * task / tasks; p < call.half * (task + 1) / tasks; ++p) {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t row = args.rows * g / groups, rows = args.rows * (g + 1) / groups - row;
                for (int h = 0; h < halves; ++h) {
                    const uint8_t* panel = call.panel(p + h * call.half);
                    // One pass fetches a fixed distance ahead; of several, each fetches its share of the next panel.
                    const int64_t ahead = groups == 1 ? Stream::AHEAD : call.panel_size + call.panel_size * g / groups;
                    const Stream stream{reinterpret_cast<const char*>(panel) + ahead,
                                        block_bytes(args.weights.bits) / groups};
                    direct(static_cast<int>(rows), args.weights.bits, args.act_bits, call.a + row * call.row_bytes,
                           call.interleaved ? 0 : call.row_bytes, panel, stream, call.padded, acc + h * PANEL, stride);
                }
                finish_rows(call, row, rows, p, 1, acc, stride);
            }
        }
    });
}

// How the tiles of a chunk of rows are handed out. The first tile of a range waits for memory, so ranges should be
// long; threads do not run at the same speed, so the last ones should be short. With one chunk, every thread first
// takes a long one, which together are three quarters; the rest is cut three times finer.
struct Ranges {
    int64_t units, count, large = 0, size = 0;  // `large` ranges of `size` tiles come first

    Ranges(int64_t units, int threads, int64_t chunks) : units(units) {
        if (threads <= 1) {
            count = 1;
        } else if (chunks == 1 && units >= 8 * threads) {
            large = threads;
            size = units * 3 / 4 / threads;
            count = 4 * threads;
        } else {
            count = smaller(units, ceil_div(8 * threads, chunks));
        }
    }
    int64_t begin(int64_t range) const {
        if (range < large) return range * size;
        return large * size + (units - large * size) * (range - large) / (count - large);
    }
};

// Rows cut into parts: of equal size, or of whole tiles with the rest in the last one.
struct Cut {
    int64_t rows, parts, size = 0;

    Cut(int64_t rows, int64_t wanted) : rows(rows), parts(wanted) {
        if (!WHOLE_TILES) return;
        size = round_up(ceil_div(rows, wanted), TILE_ROWS);
        parts = ceil_div(rows, size);
    }
    int64_t begin(int64_t part) const { return WHOLE_TILES ? smaller(rows, part * size) : rows * part / parts; }
};

void run_tiles(Call& call, int threads) {
    const LinearArgs& args = call.args;
    const int halves = args.weights.paired ? 2 : 1;
    const int64_t unit = larger(1, TILE_PANELS / halves);  // panels of the first half in a tile
    const int64_t units = ceil_div(call.half, unit);
    const int64_t wanted = threads > 1 ? 4 * threads : 1;
    int64_t chunk = larger(TILE_ROWS * 8, CHUNK_BYTES / call.row_bytes);
    if (units < wanted) chunk = smaller(chunk, larger(TILE_ROWS * 4, ceil_div(args.rows * units, wanted)));
    const Cut chunks(args.rows, ceil_div(args.rows, round_up(chunk, TILE_ROWS)));
    const Ranges ranges(units, threads, chunks.parts);
    const int64_t unpacked = unpacked_panel_bytes(call.padded, args.weights.bits);

    parallel(threads, chunks.parts * ranges.count, [&](int64_t task) {
        uint8_t* panels = static_cast<uint8_t*>(thread_scratch(unpacked * unit * halves));
        alignas(64) int32_t acc[TILE_ROWS * (TILE_PANELS + 1) * PANEL];
        TileScope scope;
        const int64_t chunk_index = task / ranges.count, row_begin = chunks.begin(chunk_index),
                      row_end = chunks.begin(chunk_index + 1), range = task % ranges.count;
        const Cut tiles(row_end - row_begin, ceil_div(row_end - row_begin, TILE_ROWS));
        for (int64_t u = ranges.begin(range); u < ranges.begin(range + 1); ++u) {
            const int64_t first = u * unit, count = smaller(unit, call.half - first), all = count * halves;
            // Multiplied together, and interleaved: all of them, or one at a time where a tile holds but one panel.
            const int64_t together = smaller(all, TILE_PANELS);
            // Partners of a paired layer are half of it apart.
            const int64_t apart = halves == 1 ? 1 : count == 1 ? call.half : 0;
            TilePanels weights{call.panel(first), call.panel_size * apart, panels, true};
            for (int64_t i = 0; i < all && !reads_stored(args.weights.bits, weights); ++i) {
                unpack_panel(call.panel(first + i % count + i / count * call.half), call.padded, args.weights.bits,
                             static_cast<int>(i % together), static_cast<int>(together),
                             panels + i / together * together * unpacked);
            }
            // The next tile's panels, spread evenly over the blocks of all tiles of rows of this one.
            const int64_t next = smaller(unit, call.half - first - unit), bytes = call.panel_size * larger(0, next);
            const int64_t steps = call.padded / BLOCK;  // of one tile of rows
            const int64_t lines = ceil_div(bytes / 64, tiles.parts * steps);
            for (int64_t t = 0; t < tiles.parts; ++t) {
                const int64_t row = row_begin + tiles.begin(t), rows = row_begin + tiles.begin(t + 1) - row;
                const int64_t stride = all * PANEL;
                const int64_t done = t * steps * lines * 64;
                Prefetch prefetch;
                if (done < bytes) {
                    prefetch.next = reinterpret_cast<const char*>(call.panel(first + unit)) + done;
                    prefetch.lines = static_cast<int>(lines);
                }
                // A rest of rows is multiplied together with rows before it, so that tiles keep their shape.
                const int64_t computed = tile_rows_for(rows, row_end - row_begin), again = computed - rows;
                for (int64_t i = 0; i < all; i += together) {
                    weights.unpacked = panels + i * unpacked;
                    tile(scope, static_cast<int>(together), static_cast<int>(computed), args.weights.bits,
                         args.act_bits, call.a + (row - again) * call.row_bytes, call.row_bytes, weights, call.padded,
                         acc + i * PANEL, stride, i == 0 ? prefetch : Prefetch{});
                }
                finish_rows(call, row, rows, first, count, acc + again * stride, stride);
                weights.first = false;
            }
        }
    });
}

// Codes [rows, in_features] → [padded / 4][rows][4], zeros behind in_features.
void interleave_rows(const int8_t* codes, int64_t in_features, int64_t rows, int64_t padded, int8_t* out) {
    const int64_t whole = in_features / 4 * 4;
    for (int64_t k = 0; k < whole; k += 4) {
        for (int64_t r = 0; r < rows; ++r, out += 4) __builtin_memcpy(out, codes + r * in_features + k, 4);
    }
    for (int64_t k = whole; k < padded; k += 4) {
        for (int64_t r = 0; r < rows; ++r, out += 4) {
            for (int64_t i = 0; i < 4; ++i) out[i] = k + i < in_features ? codes[r * in_features + k + i] : int8_t{0};
        }
    }
}

}  // namespace

Status linear(const LinearArgs& args, int threads) {
    const Weights& w = args.weights;
    const int64_t padded = padded_k(w.in_features);
    if (args.rows == 0 || w.out_features == 0) return Status::ok;
    if (args.rows * w.out_features * w.in_features < SERIAL_PRODUCTS) threads = 1;

    // One buffer around the loops: the constants of the rows, then the converted activations if the products need any.
    const bool direct_path = args.rows <= direct_limit(w.bits);
    const int64_t groups = ceil_div(args.rows, DIRECT_GROUP);
    const bool interleave = direct_path && ceil_div(args.rows, groups) >= INTERLEAVED_ROWS;
    const int64_t row_bytes = operand_row_bytes(padded, w.bits);
    const bool as_is = operand_is_codes(w.bits) && row_bytes == w.in_features && !interleave;
    const int64_t terms_bytes = round_up(args.rows * static_cast<int64_t>(sizeof(RowTerm)), 64);
    char* buffer = static_cast<char*>(call_scratch(terms_bytes + (as_is ? 0 : args.rows * row_bytes)));
    RowTerm* terms = reinterpret_cast<RowTerm*>(buffer);
    row_terms(args, terms);
    int8_t* converted = reinterpret_cast<int8_t*>(buffer + terms_bytes);
    if (interleave) {
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t row = args.rows * g / groups, rows = args.rows * (g + 1) / groups - row;
            interleave_rows(args.codes + row * w.in_features, w.in_features, rows, padded, converted + row * row_bytes);
        }
    } else if (!as_is) {
        const int64_t per_task = larger(1, 32768 / padded);
        parallel(threads, ceil_div(args.rows, per_task), [&](int64_t task) {
            for (int64_t row = task * per_task; row < smaller(args.rows, (task + 1) * per_task); ++row) {
                convert_row(args.codes + row * w.in_features, w.in_features, padded, w.bits,
                            converted + row * row_bytes);
            }
        });
    }
    Call call{args,
              as_is ? args.codes : converted,
              row_bytes,
              interleave,
              terms,
              padded,
              panel_bytes(w.in_features, w.bits),
              panel_count(w.out_features, w.paired) / (w.paired ? 2 : 1)};
    direct_path ? run_direct(call, threads) : run_tiles(call, threads);

    if (args.epilogue.kind == Epilogue::Kind::quant || args.epilogue.kind == Epilogue::Kind::swiglu_quant) {
        const int64_t width = args.epilogue.kind == Epilogue::Kind::quant ? w.out_features : w.out_features / 2;
        sum_codes(args.epilogue.codes, args.rows, width, threads);
    }
    return call.not_finite ? Status::not_finite : Status::ok;
}

}  // namespace ptq::PTQ_NS
