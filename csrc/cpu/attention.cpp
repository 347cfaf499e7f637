// Attention over the quantized cache, in float32.
//
//   K^_j = (code - zq) * delta              zq and delta belong to the group of slot j and to the head
//   s_j  = (q . (code_j - zq)) * (delta * softmax_scale)
//   p_j  = e^(s_j - max s),  w_j = p_j * delta
//   out  = sum_j w_j (code_j - zq) / sum_j p_j
//
// code - zq is exact. The operations of a query and their order depend on its own slots only: a dot product has 16
// partial sums, the sum of p too (one per slot modulo 16), and the output is added up slot by slot. GROUP queries share
// the conversion of keys and values; a slot which only others of the group see has weight 0 for a query, and adding 0
// times a number changes nothing.
#include "activation.h"
#include "row_math.h"
#include "rows.h"
#include "threads.h"

namespace ptq::PTQ_NS {
namespace {

constexpr int GROUP = 4;              // queries
constexpr int64_t TASK_QUERIES = 32;  // queries of one task: they share the tables of the slots
// Vectors of output that fit into the registers.
#if defined(PTQ_ISA_AVX512VNNI)
constexpr int ACCUMULATORS = 16;
#else
constexpr int ACCUMULATORS = 4;
#endif

// Neighbouring slots of one group.
struct Run {
    int64_t end;
    int32_t group;
};

int64_t find_runs(const int32_t* group, int64_t slots, Run* runs) {
    int64_t count = 0;
    for (int64_t j = 0; j < slots; ++j) {
        if (j == 0 || group[j] != group[j - 1]) runs[count++].group = group[j];
        runs[count - 1].end = j + 1;
    }
    return count;
}

// Scratch of a task. Arrays over the slots are padded to whole vectors.
struct Scratch {
    float *k_factor, *k_zq, *v_delta, *v_zq;  // [slots]; k_factor = delta * softmax_scale
    float* weights;                           // [GROUP][slots]: s, then p, then w
    float* q;                                 // [GROUP][lanes]

    Scratch(int64_t slots, int64_t lanes) {
        float* p = static_cast<float*>(
            thread_scratch(((4 + GROUP) * slots + GROUP * lanes) * static_cast<int64_t>(sizeof(float))));
        k_factor = p;
        k_zq = p + slots;
        v_delta = p + 2 * slots;
        v_zq = p + 3 * slots;
        weights = p + 4 * slots;
        q = weights + GROUP * slots;
    }
};

void fill(float* p, int64_t begin, int64_t end, float value) {
    for (int64_t j = begin; j < end; ++j) p[j] = value;
}

// One head of one sample.
struct Head {
    const int8_t *k, *v;
    int64_t lanes;         // of a cache row
    int64_t padded_slots;  // stride of Scratch::weights
    Scratch scratch;
};

// Scores of G queries with the slots [0, end). V: vectors of a cache row, 0: any number.
template <int G, int V>
void scores(const Head& head, int64_t end) {
    const Scratch& s = head.scratch;
    const int64_t lanes = V ? V * LANES : head.lanes;
    for (int64_t first = 0; first < end; first += LANES) {
        const int64_t count = smaller(LANES, end - first);
        F dots[G][LANES];
        for (int64_t j = 0; j < count; ++j) {
            const int8_t* key = head.k + (first + j) * lanes;
            const F zq = set1(s.k_zq[first + j]);
            F dot[G];
            for (int g = 0; g < G; ++g) dot[g] = set1(0.0f);
            for (int64_t i = 0; i < lanes; i += LANES) {
                const F value = to_float(load_i8(key + i)) - zq;
                for (int g = 0; g < G; ++g) dot[g] = fma(load(s.q + g * lanes + i), value, dot[g]);
            }
            for (int g = 0; g < G; ++g) dots[g][j] = dot[g];
        }
        for (int64_t j = count; j < LANES; ++j) {
            for (int g = 0; g < G; ++g) dots[g][j] = set1(0.0f);
        }
        for (int g = 0; g < G; ++g) {
            store(s.weights + g * head.padded_slots + first, sums(dots[g]) * load(s.k_factor + first));
        }
    }
}

// Scores of one query -> w; returns the sum of p. Slots from `end` to `group_end` get weight 0.
float softmax(const Head& head, float* weights, int64_t end, int64_t group_end) {
    constexpr float infinity = __builtin_inff();
    F highest = set1(-infinity);
    for_vectors(end, [&](int64_t j, int64_t n) {
        const F s = n < LANES ? select(first_lanes(n), load(weights + j), set1(-infinity)) : load(weights + j);
        store(weights + j, s);
        highest = max(highest, s);
    });
    const F top = set1(max_of(highest));
    F total = set1(0.0f);
    for_vectors(end, [&](int64_t j, int64_t) {
        const F p = exp(load(weights + j) - top);
        total = total + p;
        store(weights + j, p * load(head.scratch.v_delta + j));
    });
    fill(weights, padded_lanes(end), padded_lanes(group_end), 0.0f);
    return sum(total);
}

// sum_j w_j (code - zq) of V vectors from lane `lane` on, into out [G][lanes]: the queries themselves are not needed
// any more.
template <int G, int V>
void mix(const Head& head, int64_t end, int64_t lane) {
    const Scratch& s = head.scratch;
    F mixed[G][V];
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < V; ++i) mixed[g][i] = set1(0.0f);
    }
    for (int64_t j = 0; j < end; ++j) {
        const int8_t* codes = head.v + j * head.lanes + lane;
        const F zq = set1(s.v_zq[j]);
        F value[V];
        for (int i = 0; i < V; ++i) value[i] = to_float(load_i8(codes + i * LANES)) - zq;
        for (int g = 0; g < G; ++g) {
            const F weight = set1(s.weights[g * head.padded_slots + j]);
            for (int i = 0; i < V; ++i) mixed[g][i] = fma(weight, value[i], mixed[g][i]);
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int i = 0; i < V; ++i) store(s.q + g * head.lanes + lane + i * LANES, mixed[g][i]);
    }
}

template <int G>
void scores(const Head& head, int64_t end) {
    switch (head.lanes / LANES) {
        case 3:
            return scores<G, 3>(head, end);
        case 4:
            return scores<G, 4>(head, end);
        case 5:
            return scores<G, 5>(head, end);
        case 6:
            return scores<G, 6>(head, end);
        case 7:
            return scores<G, 7>(head, end);
        case 8:
            return scores<G, 8>(head, end);
        default:
            return scores<G, 0>(head, end);
    }
}

// The same with `vectors` <= V known when running only.
template <int G, int V>
void mix(const Head& head, int64_t end, int64_t lane, int64_t vectors) {
    if constexpr (V > 1) {
        if (vectors < V) return mix<G, V - 1>(head, end, lane, vectors);
    }
    mix<G, V>(head, end, lane);
}

// All lanes in equal portions of at most V vectors.
template <int G, int V>
void mix_all(const Head& head, int64_t end) {
    const int64_t vectors = head.lanes / LANES, portion = ceil_div(vectors, ceil_div(vectors, V));
    for (int64_t i = 0; i < vectors; i += portion) mix<G, V>(head, end, i * LANES, smaller(portion, vectors - i));
}

// Queries i, i + 1, ... i + G - 1 of a head, the last query of all in place of any beyond it.
template <int G>
void attend(const AttentionArgs& args, const Head& head, int64_t batch, int64_t h, int64_t query) {
    int64_t index[G], end[G], group_end = 0;
    for (int g = 0; g < G; ++g) {
        index[g] = smaller(query + g, args.queries - 1);
        end[g] = args.visible_end[index[g]];
        group_end = end[g] > group_end ? end[g] : group_end;
        const void* q = args.q.row((batch * args.heads + h) * args.queries + index[g]);
        for_vectors(args.head_dim, [&](int64_t i, int64_t n) {
            store(head.scratch.q + g * head.lanes + i, load(q, args.q.dtype, i, n));
        });
    }
    scores<G>(head, group_end);
    float total[G];
    for (int g = 0; g < G; ++g) {
        total[g] = softmax(head, head.scratch.weights + g * head.padded_slots, end[g], group_end);
    }
    mix_all<G, G == 1 ? ACCUMULATORS / 2 : ACCUMULATORS / G>(head, group_end);
    for (int g = 0; g < G; ++g) {
        void* out = args.out.row(batch * args.queries + index[g]);
        const F divisor = set1(total[g]);
        for_vectors(args.head_dim, [&](int64_t i, int64_t n) {
            store(out, args.out.dtype, h * args.head_dim + i, load(head.scratch.q + g * head.lanes + i) / divisor, n);
        });
    }
}

// Tables of the slots [0, slots) of a head.
void fill_tables(const AttentionArgs& args, int64_t h, const Run* runs, int64_t run_count, int64_t slots,
                 const Scratch& s) {
    int64_t begin = 0;
    for (int64_t r = 0; r < run_count; begin = runs[r++].end) {
        const int64_t row = runs[r].group * args.heads + h, end = runs[r].end;
        fill(s.k_factor, begin, end, args.tables.k[row].delta * args.softmax_scale);
        fill(s.k_zq, begin, end, args.tables.k[row].zq);
        fill(s.v_delta, begin, end, args.tables.v[row].delta);
        fill(s.v_zq, begin, end, args.tables.v[row].zq);
    }
    // What lies beyond is multiplied with zeros; it must be finite.
    fill(s.k_factor, slots, padded_lanes(slots), 0.0f);
    fill(s.v_delta, slots, padded_lanes(slots), 0.0f);
}

}  // namespace

void attention(const AttentionArgs& args, int threads) {
    if (args.batch * args.heads * args.queries == 0) return;
    if (args.batch * args.heads * args.queries * args.span * args.head_dim < SERIAL_PRODUCTS) threads = 1;
    Run* runs = static_cast<Run*>(call_scratch(args.span * static_cast<int64_t>(sizeof(Run))));
    const int64_t run_count = find_runs(args.tables.group, args.span, runs);
    const int64_t parts = ceil_div(args.queries, TASK_QUERIES);
    parallel(threads, args.batch * args.heads * parts, [&](int64_t task) {
        const int64_t part = task % parts, h = task / parts % args.heads, batch = task / parts / args.heads;
        const int64_t padded_slots = padded_lanes(args.span);
        const Head head{args.k.slot(batch, h, 0), args.v.slot(batch, h, 0), args.k.lanes, padded_slots,
                        Scratch(padded_slots, args.k.lanes)};
        fill_tables(args, h, runs, run_count, args.span, head.scratch);
        const int64_t end = smaller(args.queries, (part + 1) * TASK_QUERIES);
        for (int64_t query = part * TASK_QUERIES; query < end;) {
            if (end - query == 1) {
                attend<1>(args, head, batch, h, query);
                break;
            }
            attend<GROUP>(args, head, batch, h, query);
            query += GROUP;
        }
    });
}

}  // namespace ptq::PTQ_NS
