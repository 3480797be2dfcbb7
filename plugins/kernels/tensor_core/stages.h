// The maps for which there is a resident kernel: those of the four stages of VMamba-T and -S (ranks 6 to 48) and
// VMamba-B (ranks 8 to 64), for images of 224 x 224.
#pragma once

#include "geometry.h"

namespace quartermap
{
namespace tensor_core
{

struct StageFacts
{
    int width;
    int height;
    int ranks;
    int rank_blocks;
    int channels; // of a block
    int chunk;    // positions
    int chunks;
    int warps; // of a team
    int threads;
    int shared_bytes;
    int blocks; // on a multiprocessor, by registers
};

template <class G>
constexpr StageFacts facts_of()
{
    int const chunk = G::warps * kSlots * 2 * G::kTiles;
    return {G::width, G::height, G::ranks, kPreparedBlocks<G>, kChannels * G::kGroups, chunk, G::chunks, G::warps,
        G::threads, G::shared_bytes, G::kBlocks};
}

template <class... G>
struct StageTable
{
    static constexpr StageFacts facts[sizeof...(G)] = {facts_of<G>()...};
};

//                     map    R warps teams groups private blocks
using Stages = StageTable<
    ResidentGeometry<56, 56, 6, 8, 2, 1, true, 1>,
    ResidentGeometry<56, 56, 8, 8, 2, 1, true, 1>,
    ResidentGeometry<28, 28, 12, 7, 1, 1, false, 2>,
    ResidentGeometry<28, 28, 16, 7, 1, 1, false, 2>,
    ResidentGeometry<14, 14, 24, 1, 1, 4, false, 3>,
    ResidentGeometry<14, 14, 32, 1, 1, 4, false, 3>,
    ResidentGeometry<7, 7, 48, 1, 1, 8, false, 2>,
    ResidentGeometry<7, 7, 64, 1, 1, 8, false, 2>>;

// Blocks of ranks for which there is a split kernel.
constexpr int kSplitRankBlocks[] = {1, 2, 4, 8};
constexpr int kMostSplitWarps = 8;

// Blocks of as many warps for which a multiprocessor has registers: two where that makes no kernel keep more than 16 bytes
// in memory for want of them (instructions.py), which are those of the largest maps.
QUARTERMAP_INLINE constexpr int split_blocks(bool float16, int rank_blocks, int tiles, bool odd)
{
    return float16 && tiles == 7 && !odd && rank_blocks <= 2 ? 2 : 1;
}

// The same for the kernel of several states.
QUARTERMAP_INLINE constexpr int states_blocks(bool float16, int tiles, bool odd)
{
    return float16 && tiles == 7 && !odd ? 2 : 1;
}

} // namespace tensor_core
} // namespace quartermap
