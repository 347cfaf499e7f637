// The table of one instruction set's kernels; compiled once per set.
#include "ceiling.h"
#include "codes.h"
#include "gemm.h"
#include "rows.h"

#define PTQ_CAT2(a, b) a##b
#define PTQ_CAT(a, b) PTQ_CAT2(a, b)
#define PTQ_TEXT2(a) #a
#define PTQ_TEXT(a) PTQ_TEXT2(a)

namespace ptq {

const Kernels* PTQ_CAT(kernels_, PTQ_NS)() {
    static const Kernels table = {
        PTQ_TEXT(PTQ_NS),  PTQ_NS::quantize,   PTQ_NS::adaln_quant, PTQ_NS::linear,      PTQ_NS::qkv_append,
        PTQ_NS::attention, PTQ_NS::good_codes, PTQ_NS::products,    PTQ_NS::read_memory,
    };
    return &table;
}

}  // namespace ptq
