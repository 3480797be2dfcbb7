// Which of the kernels in this folder suit a scan, and how they divide it; decided on the host without a device.
#pragma once

#include <cstdint>

#include "../launch_plan.h"
#include "stages.h"

namespace quartermap
{
namespace tensor_core
{

// Of the workspace, the most that parts of the directions may take: a plan that needs more is none.
constexpr std::int64_t kMostPartBytes = 64 * 1024 * 1024;
constexpr int kSmallThreads = 256; // of the kernels before and after
constexpr int kSumBytes = 8 * kSmallThreads; // of shared memory: a float for each position that its block has
constexpr int kMostPrepareBlocks = 256;
constexpr int kAnyKind = -1;
constexpr int kMostRanks = 64;
constexpr int kMostStates = 64;
// The prepared weights of so many channels are counted in 32 bits.
constexpr std::int64_t kMostInner = std::int64_t{1} << 20;

// Offsets into the workspace, in bytes.
struct Workspace
{
    std::int64_t weight;
    std::int64_t bias;
    std::int64_t skip;
    std::int64_t told;
    std::int64_t maps;
    std::int64_t parts;
    std::int64_t bytes;
    std::int64_t told_count;
};

// Whether a scan is one that these kernels know, whatever its map.
inline bool known(QuartermapScan const& scan)
{
    return scan.element_type != QUARTERMAP_FLOAT32 && scan.d_state <= kMostStates && scan.softplus != 0
        && scan.dt_rank > 0 && scan.dt_rank <= kMostRanks && scan.d_inner % kChannels == 0 && scan.d_inner <= kMostInner;
}

inline std::int64_t part_bytes(QuartermapScan const& scan)
{
    // By a quotient, as the product might overflow.
    std::int64_t const map = scan.height * ((scan.width + 1) / 2 * 2) * 2 * scan.direction_count;
    return scan.batch * scan.d_inner > kMostPartBytes / map ? kMostPartBytes + 1 : scan.batch * scan.d_inner * map;
}

inline Workspace workspace_of(QuartermapScan const& scan, LaunchPlan const& plan)
{
    Workspace found{};
    std::int64_t at = 0;
    auto const place = [&at](std::int64_t bytes) {
        std::int64_t const here = at;
        at += ceil_div(bytes, 256) * 256;
        return here;
    };
    std::int64_t const rows = scan.direction_count * scan.d_inner;
    bool const split = plan.kernels == QUARTERMAP_SPLIT;
    found.told_count = split && plan.parts > 1 ? rows * scan.batch * plan.parts * scan.d_state : 0; // one for each state
    found.weight = place(rows * 8 * plan.rank_blocks * 2);
    found.bias = place(rows * 4);
    found.skip = place(scan.d_inner * 4);
    found.told = place(found.told_count * 4);
    found.maps = place(found.told_count * 8);
    found.parts = place(split ? part_bytes(scan) : 0);
    found.bytes = at;
    return found;
}

// At least what any plan for the scan, or for one with a smaller batch, height or width, needs.
inline std::int64_t most_workspace(QuartermapScan const& scan)
{
    if (!known(scan))
    {
        return 0;
    }
    LaunchPlan plan{};
    plan.rank_blocks = kMostRanks / 8;
    std::int64_t const parts = part_bytes(scan);
    std::int64_t const most = parts < kMostPartBytes ? parts : kMostPartBytes;
    // A direction of more than one chunk has chunks of at least five warps, 280 positions: what they tell each other, 12
    // bytes for each state, is less than a fortieth of the 560 bytes that the parts of their positions take.
    return workspace_of(scan, plan).bytes + most + most * scan.d_state / 40 + 4096;
}

inline void finish(QuartermapScan const& scan, LaunchPlan& plan, int channels, int threads, int shared_bytes)
{
    plan.channels_per_thread = channels;
    plan.groups = 1;
    plan.sequence_threads = threads;
    plan.shared_bytes = shared_bytes;
    plan.tiles = static_cast<int>(scan.d_inner / channels);
    std::int64_t const weights = scan.direction_count * scan.d_inner * 8 * plan.rank_blocks;
    plan.prepare_blocks
        = static_cast<int>(std::min<std::int64_t>(ceil_div(weights, kSmallThreads), kMostPrepareBlocks));
}

inline bool in_order(QuartermapScan const& scan)
{
    return scan.direction_count == 4 && scan.directions[0] == QUARTERMAP_ROW && scan.directions[1] == QUARTERMAP_COLUMN
        && scan.directions[2] == QUARTERMAP_ROW_REVERSE && scan.directions[3] == QUARTERMAP_COLUMN_REVERSE;
}

// The resident kernel's plan; false where there is none for the scan.
inline bool resident_plan(QuartermapScan const& scan, LaunchPlan& plan)
{
    if (!known(scan) || scan.d_state > 1 || !in_order(scan))
    {
        return false;
    }
    int number = 0;
    for (StageFacts const& stage : Stages::facts)
    {
        if (stage.width == scan.width && stage.height == scan.height && stage.ranks == scan.dt_rank
            && scan.d_inner % stage.channels == 0)
        {
            plan = {};
            plan.kernels = QUARTERMAP_RESIDENT;
            plan.stage = number;
            plan.resident = true;
            plan.parts = 1;
            plan.rank_blocks = stage.rank_blocks;
            plan.chunk = stage.chunk;
            plan.chunks = stage.chunks;
            plan.warps = stage.warps;
            finish(scan, plan, stage.channels, stage.threads, stage.shared_bytes);
            plan.blocks = plan.tiles * scan.batch;
            return true;
        }
        ++number;
    }
    return false;
}

// Warps of a team of the split kernel: so many that a chunk begins where a pair of columns begins, and no more than
// have something to do; 0 if there are none.
inline int split_warps(int row_blocks, int slots)
{
    int best = 0;
    for (int warps = 1; warps <= kMostSplitWarps; ++warps)
    {
        bool const enough = best * kSlots >= slots;
        best = kSlots * warps % row_blocks == 0 && (best == 0 || !enough) ? warps : best;
    }
    return best;
}

// How the work on 16 channels is divided among blocks of the split kernel.
enum class Blocks
{
    kOfAllDirections, // none is apart: y is added to in global memory
    kOfDirections,
    kOfChunks
};

// A plan of the split kernel, with segments of kTiles positions along columns; false where there is none.
template <int kTiles, bool kOdd>
bool split_plan(QuartermapScan const& scan, Blocks blocks, LaunchPlan& plan)
{
    bool const streamed = blocks == Blocks::kOfAllDirections;
    if (!known(scan) || scan.height % kTiles != 0 || (scan.width % 2 != 0) != kOdd
        || (streamed ? kOdd : part_bytes(scan) > kMostPartBytes))
    {
        return false;
    }
    int const ranks = static_cast<int>(scan.dt_rank);
    int const row_blocks = static_cast<int>(scan.height) / kTiles;
    int const slots = row_blocks * (static_cast<int>(scan.width + 1) / 2);
    int const warps = split_warps(row_blocks, slots);
    if (warps == 0)
    {
        return false;
    }
    plan = {};
    plan.kernels = streamed ? QUARTERMAP_STREAMED : QUARTERMAP_SPLIT;
    for (int count : kSplitRankBlocks)
    {
        plan.rank_blocks = plan.rank_blocks == 0 && ranks <= 8 * count ? count : plan.rank_blocks;
    }
    plan.rank_blocks = scan.d_state > 1 ? static_cast<int>(ceil_div(ranks, 8)) : plan.rank_blocks;
    SplitGeometry<1, kTiles, kOdd> const g(static_cast<int>(scan.height), static_cast<int>(scan.width), ranks, warps,
        static_cast<int>(scan.d_state));
    plan.stage = kTiles;
    plan.warps = warps;
    plan.chunks = g.chunks;
    plan.chunk = warps * kSlots * 2 * kTiles;
    plan.parts = blocks == Blocks::kOfChunks ? g.chunks : 1;
    finish(scan, plan, kChannels, 32 * warps, g.shared_bytes);
    plan.blocks = scan.batch * plan.tiles * (streamed ? 1 : scan.direction_count * plan.parts);
    return true;
}

// As `estimate` of the general kernel, in the same units. Counted in the machine code for compute capability 9.0
// (benchmarks/gpu/instructions.py); not measured on a GPU. Streamed y, which moves between the cache and the block for each
// direction, is taken as ten instructions more.
inline double estimate_cost(QuartermapScan const& scan, DeviceLimits const& limits, LaunchPlan const& plan)
{
    constexpr double kLaunch = 450e3; // two microseconds of a multiprocessor
    bool const resident = plan.kernels == QUARTERMAP_RESIDENT;
    bool const split = plan.kernels == QUARTERMAP_SPLIT;
    double const rank = static_cast<double>(scan.dt_rank);
    double const one_state = resident ? 15.0 + 0.25 * rank : (split ? 24.0 : 36.0) + 0.15 * rank;
    double const each_state = scan.d_state > 1 ? 9.4 * static_cast<double>(scan.d_state) : 0.0;
    double const instructions = one_state + each_state;
    double const positions = split && plan.parts > 1 ? plan.chunk : static_cast<double>(scan.height * scan.width);
    double const block = instructions * plan.channels() * positions * (split ? 1.0 : scan.direction_count);
    std::int64_t const by_memory = limits.shared_per_multiprocessor / (plan.shared_bytes + 1024);
    bool const float16 = scan.element_type == QUARTERMAP_FLOAT16;
    int const full = resident ? 0 : split_blocks(float16, plan.rank_blocks, plan.stage, scan.width % 2 != 0);
    std::int64_t const by_registers
        = resident ? Stages::facts[plan.stage].blocks : full * 32 * kMostSplitWarps / plan.threads();
    std::int64_t const most = std::max<std::int64_t>(1, std::min(by_memory, by_registers));
    std::int64_t const wanted = ceil_div(plan.blocks, limits.multiprocessors);
    double const together = static_cast<double>(wanted) * block
        + static_cast<double>(ceil_div(wanted, most)) * block / plan.threads() * 256.0;
    // The kernel before, the one after, and what that reads.
    double const maps = static_cast<double>(part_bytes(scan)) / limits.multiprocessors;
    return together + kLaunch + (split ? kLaunch + 2.0 * maps : 0.0);
}

// The best plan of these kernels, or of one kind (QuartermapKernels) of them; false where none suits the scan and the
// device.
inline bool make_plan(QuartermapScan const& scan, DeviceLimits const& limits, int kind, LaunchPlan& best)
{
    bool found = false;
    LaunchPlan plan{};
    auto const consider = [&](bool possible) {
        if (possible && (kind == kAnyKind || plan.kernels == kind) && plan.shared_bytes <= limits.shared_per_block
            && (!found || estimate_cost(scan, limits, plan) < estimate_cost(scan, limits, best)))
        {
            best = plan;
            found = true;
        }
    };
    consider(resident_plan(scan, plan));
    for (Blocks const blocks : {Blocks::kOfAllDirections, Blocks::kOfDirections, Blocks::kOfChunks})
    {
        consider(split_plan<7, false>(scan, blocks, plan));
        consider(split_plan<8, false>(scan, blocks, plan));
        consider(split_plan<7, true>(scan, blocks, plan));
    }
    return found;
}

} // namespace tensor_core
} // namespace quartermap
