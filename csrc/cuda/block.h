// A transformer block of a decode step in one call: seven launches, five where the products normalise their rows
// themselves (few rows).
//
//   stream → [norm 1, modulation → codes] → qkv → append, attention → codes → proj, gate, + stream
//          → [norm 2, modulation → codes] → fc1, activation → codes → fc2, gate, + stream
//
// With several positions per sequence, append is a launch of its own. Nothing is allocated here and nothing waits.
#pragma once

#include <vector>

#include "attention_operands.h"
#include "gemm_operands.h"

namespace ptq::cuda {

// What a call brings beside its rows: conditioning, caches, and where the launches go.
struct Call {
    int64_t batch = 0;
    Positions positions;
    Rows in;          // [M, width]
    MutableRows out;  // [M, ...], dense
    Rows modulation;  // [R, >= chunks * width], or absent
    int64_t mod_count = 0;
    RowMap map;
    char* workspace = nullptr;
    unsigned int* counters = nullptr;
    Stream stream;
};

// A part of a workspace.
struct Piece {
    int64_t offset = 0, bytes = 0;
};

struct Workspace {
    int64_t bytes = 0, counters = 0;
    std::vector<Piece> pieces;

    Piece add(int64_t size) {
        constexpr int64_t ALIGN = 256;
        const Piece piece{bytes, size};
        bytes += ceil_div(size, ALIGN) * ALIGN;
        pieces.push_back(piece);
        return piece;
    }
};

// A product that follows a norm: how it is computed from codes, and, if `fused`, from the rows themselves.
struct NormedProduct {
    GemmPlan plain, norm;
    bool fused = false;
};

// --- a linear layer on floating-point rows
// ---------------------------------------------------------------------------

struct LayerPlan {
    GemmLayer layer;
    bool normed = false;
    BlockNorm norm;                            // if normed
    Activation activation = Activation::none;  // otherwise, before the codes
};

struct LayerSchedule {
    NormedProduct product;
    Workspace workspace;
    Piece codes, scratch;
};

LayerSchedule schedule_layer(const LayerPlan& plan, int64_t rows, const DeviceInfo& device);
void run_layer(const LayerPlan& plan, const LayerSchedule& schedule, const Call& call);

// --- a block
// ---------------------------------------------------------------------------------------------------------

struct BlockPlan {
    int64_t width = 0, hidden = 0;  // hidden: input of fc2
    BlockNorm norm1, norm2;
    GemmLayer qkv, proj, fc1, fc2;
    Activation activation = Activation::none;  // of fc1, unless that is paired
    HeadOperands heads;
    SlotGroups groups;
    float softmax_scale = 1;

    int64_t inner() const { return heads.heads * heads.head_dim; }
    int chunks() const { return static_cast<int>(larger(norm1.chunks(), norm2.chunks())); }
};

struct BlockCall : Call {
    const int32_t* visible_end = nullptr;
    int64_t span = 0;
    Cache k, v;
};

struct BlockSchedule {
    NormedProduct qkv, fc1;
    GemmPlan proj, fc2;
    AttentionPlan attention;
    Workspace workspace;
    Piece codes, hidden, joined, q, scratch;  // joined: the output of qkv; q: of append, if that is a launch
};

// batch sequences of `period` positions looking at `span` slots at most; dtype: of the stream.
BlockSchedule schedule_block(const BlockPlan& plan, int64_t batch, int64_t period, int64_t span, DType dtype,
                             const DeviceInfo& device);
void run_block(const BlockPlan& plan, const BlockSchedule& schedule, const BlockCall& call);

}  // namespace ptq::cuda
