// How a map is divided: places, segments, tasks, chunks, and the shared memory that goes with them.
//
//   tile      8 positions of 16 channels: what one product of matrices makes. Which positions these are is free.
//   segment   positions that a lane walks one after the other: along rows 2 x kTiles neighbours in a row (two of each
//             tile), along columns kTiles neighbours in each of two columns that lie side by side (two segments). A lane
//             has two neighbours of a row in every tile, whatever the direction, so that one word of 32 bits serves two
//             positions, and x and y stay as the tensors have them: nothing needs a transposed copy.
//   slot      the 2 x kTiles positions of a lane: a segment of a row, or two of columns
//   task      what a warp does at a time: 16 channels at the four slots of its quads (lanes with the same lane / 4 hold
//             the same two channels)
//   chunk     the tasks that the warps of a team do together, in the order of a direction
//
// Maps of odd width have a column more, in which nothing happens (its decay is 1, its drive 0).
#pragma once

#include "../host_device.h"

namespace quartermap
{
namespace tensor_core
{

constexpr int kChannels = 16; // rows of a product
constexpr int kSlots = 4;     // of a task
constexpr int kRowBytes = 16; // of a tile, for one rank
constexpr int kTileBytes = 80; // B and C of a tile: for each position both, in the half that its column has; and a zero
constexpr int kZeroAt = 64;    // where that stands
constexpr int kSegmentBytes = 160; // the maps of a segment, 8 bytes for each channel, and a gap against bank conflicts
constexpr int kMostSegments = 8;   // of a task

// Where the bias of the time step goes: into two ranks that are left over in the last block of 8; into a factor of its
// own, which costs nothing beside an odd number of blocks; or into the product as what it is added to, which costs
// copies.
enum class Bias
{
    kSpareRanks,
    kOwnFactor,
    kAddend
};

constexpr int ceil_to(int value, int multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

// A map whose sizes the compiler knows. x and the sum over the directions lie in shared memory, 16 x kGroups channels
// of one image in a block, which walks the four directions.
//
//   kWarps     in a team
//   kTeams     2: a direction and its reverse at the same time, from the two ends; 1: one direction after the other
//   kPrivate   a warp stages what its task needs; else the block stages a direction, for all groups
//   kBlocks    on a multiprocessor
template <int kWidth, int kHeight, int kRanks, int kWarps, int kTeams_, int kGroups_, bool kPrivate_, int kBlocks_>
struct ResidentGeometry
{
    static constexpr bool kResident = true;
    static constexpr bool kPrivate = kPrivate_;
    static constexpr int kTeams = kTeams_;
    static constexpr int kGroups = kGroups_;
    static constexpr int kBlocks = kBlocks_;
    static constexpr int kTiles = 7;
    static constexpr bool kOdd = kWidth % 2 != 0;
    static constexpr int kRankBlocks = ceil_to(kRanks, 8) / 8;
    static constexpr Bias kBias = kRanks + 2 <= 8 * kRankBlocks ? Bias::kSpareRanks
        : kRankBlocks % 2 == 1                                  ? Bias::kOwnFactor
                                                                : Bias::kAddend;

    static constexpr int width = kWidth;
    static constexpr int height = kHeight;
    static constexpr int pitch = ceil_to(kWidth, 2);
    static constexpr int ranks = kRanks;
    static constexpr int warps = kWarps;
    static constexpr int row_blocks = kHeight / kTiles;
    static constexpr int slots = row_blocks * pitch / 2;
    static constexpr int tasks = ceil_to(slots, kSlots) / kSlots;
    static constexpr int chunks = ceil_to(tasks, kWarps) / kWarps;
    // A warp has one block of rows and the lanes of a quad neighbouring columns, which meet different banks.
    static constexpr bool interleaved = row_blocks == kWarps && pitch / 2 % kSlots == 0;

    // Channels stand 4 banks apart, so that the lanes of a warp meet different ones.
    static constexpr int map_bytes = ceil_to(kHeight * pitch * 2 - 16, 128) + 16;
    static constexpr int all_maps_bytes = kChannels * kGroups * map_bytes;
    static constexpr int stage_bytes = kRanks * kTiles * kRowBytes;
    static constexpr int task_bytes = stage_bytes + kTiles * kTileBytes;
    static constexpr int sums_bytes = kMostSegments * kSegmentBytes;
    static constexpr int bc_at = kPrivate && stage_bytes < sums_bytes ? sums_bytes : stage_bytes;
    // A private stage of time steps has been read when the maps of the segments are written over it.
    static constexpr int warp_bytes = kPrivate ? bc_at + kTiles * kTileBytes : sums_bytes;
    static constexpr int state_at = kWarps * warp_bytes;
    static constexpr int team_bytes = state_at + 64;
    static constexpr int all_warps = kWarps * kTeams * kGroups;
    static constexpr int buffers_at = 2 * all_maps_bytes;
    static constexpr int stage_at = buffers_at + kTeams * kGroups * team_bytes;
    static constexpr int ones_at = stage_at + (kPrivate ? 0 : tasks * task_bytes);
    static constexpr int shared_bytes = ones_at + kTiles * kRowBytes;
    static constexpr int threads = 32 * all_warps;

    static_assert(kHeight % kTiles == 0 && kRanks % 2 == 0);
    static_assert(kPrivate ? interleaved && !kOdd : kTeams == 1);

    // Where a team has the map of its n-th segment.
    QUARTERMAP_INLINE static constexpr int segment_at(int n, bool column)
    {
        int const of_task = column ? kMostSegments : kSlots;
        return column && interleaved ? n % kWarps * warp_bytes + n / kWarps * kSegmentBytes
                                     : n / of_task * warp_bytes + n % of_task * kSegmentBytes;
    }
};

// A map of any width, even or odd, whose height is a multiple of kTiles. A block walks one direction of 16 channels of
// one image, or one chunk of it; x is read from global memory, and what the direction adds is written there. With several
// states a warp has B and C of two of them at a time.
template <int kRankBlocks_, int kTiles_, bool kOdd_>
struct SplitGeometry
{
    static constexpr bool kResident = false;
    static constexpr bool kPrivate = true;
    static constexpr int kTeams = 1;
    static constexpr int kTiles = kTiles_;
    static constexpr int kRankBlocks = kRankBlocks_;
    static constexpr bool kOdd = kOdd_;
    static constexpr Bias kBias = Bias::kAddend;
    static constexpr bool interleaved = false;

    int width;
    int height;
    int pitch;
    int ranks;
    int warps;
    int row_blocks;
    int slots;
    int chunks;
    int bc_at;
    int warp_bytes;
    int sums_at;
    int state_at;
    int shared_bytes;

    QUARTERMAP_INLINE SplitGeometry(int height_, int width_, int ranks_, int warps_, int states = 1)
        : width(width_)
        , height(height_)
        , pitch(width_ + (kOdd_ ? 1 : 0))
        , ranks(ranks_)
        , warps(warps_)
        , row_blocks(height_ / kTiles)
        , slots(row_blocks * (pitch / 2))
        , chunks((slots + kSlots * warps_ - 1) / (kSlots * warps_))
        , bc_at(ranks_ * kTiles * kRowBytes)
        , warp_bytes(bc_at + (states > 1 ? 2 : 1) * kTiles * kTileBytes)
        , sums_at(warps_ * warp_bytes)
        , state_at(sums_at + warps_ * kMostSegments * kSegmentBytes)
        , shared_bytes(state_at + 64 * states)
    {
    }

    QUARTERMAP_INLINE int segment_at(int n, bool /*column*/) const
    {
        return sums_at + n * kSegmentBytes;
    }
};

// Blocks of 8 ranks of a prepared weight.
template <class G>
constexpr int kPreparedBlocks = G::kRankBlocks + (G::kBias == Bias::kOwnFactor ? 1 : 0);

// The slot of a lane, and the first of its two positions in the first tile. Slots past the last repeat the first; what
// is computed there is left out.
struct Slot
{
    int first;
    bool live;
};

template <bool kColumn, class G>
QUARTERMAP_INLINE Slot slot_of(G const& g, int task, int q)
{
    int const slot = kSlots * task + q;
    int const block = g.interleaved ? task % g.warps : slot % g.row_blocks;
    int const pair = g.interleaved ? kSlots * (task / g.warps) + q : slot / g.row_blocks;
    int const first = kColumn ? block * G::kTiles * g.pitch + 2 * pair : 2 * G::kTiles * slot;
    bool const live = g.slots % kSlots == 0 && G::kResident ? true : slot < g.slots;
    return {live ? first : 0, live};
}

// Of a slot, how far apart its positions in two tiles lie.
template <bool kColumn, class G>
QUARTERMAP_INLINE int tile_step(G const& g)
{
    return kColumn ? g.pitch : 2;
}

// The place among the segments of a chunk, in the order of the direction, of a lane's segment at its column `e`.
template <bool kColumn, class G>
QUARTERMAP_INLINE int segment_of(G const& g, int warp, int q, int e)
{
    if constexpr (!kColumn)
    {
        return kSlots * warp + q;
    }
    int const slot = kSlots * warp + q;
    int const block = g.interleaved ? warp : slot % g.row_blocks;
    int const pair = g.interleaved ? q : slot / g.row_blocks;
    return (2 * pair + e) * g.row_blocks + block;
}

} // namespace tensor_core
} // namespace quartermap
