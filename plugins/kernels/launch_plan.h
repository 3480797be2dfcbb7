// How one launch is divided among blocks and threads, decided on the host without a device.
//
//   thread block   one batch element, `groups` x `channels_per_thread` channels; all directions, one after the other
//   group          `sequence_threads` threads that walk one and the same order; each has `kPositions` consecutive
//                  positions of `channels_per_thread` channels in registers
//   chunk          sequence_threads * kPositions positions, scanned at once; the state is carried to the next chunk
//
// Shared memory holds, from its start:
//
//   y        channels x map        float32   the sum over the directions                 (resident plans)
//   weights  d_t rank x channels   float32   of the direction at hand
//   totals   2 x groups x channels_per_thread x warps    (a, b)                           (more than one warp in a group)
//   carries  2 x channels x N      float32                                               (N > 1)
//   skips    channels              float32   D, added up over the directions
//   x        channels x map        T                                                     (resident plans)
//   stage    rows x stage_row      T         dt, B and C of the chunk
//
// `map` is H rows of `map_pitch` places, and a staged row of a column order is H rows of `stage_pitch` places. Both
// pitches are chosen so that the threads of a warp, which stand kPositions places apart in the order of the scan, meet
// different banks. That is why kPositions is odd: along rows the threads then meet different banks by themselves. It is
// 7 because the maps of a 224 x 224 image have sides of 56, 28, 14 and 7.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quartermap/selective_scan.h"

namespace quartermap
{

constexpr int kPositions = 7;
constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / 32;
// Maps of a channel that are resident on every device: of the 99 KiB that a block has at least (compute capability 8.6,
// 8.9 and 12.0), 28 KiB are for the stage of the shortest chunk with 16 rows, and 6.1 KiB for weights and carries.
constexpr std::int64_t kAlwaysResidentBytes = 64 * 1024;

struct LaunchPlan
{
    int channels_per_thread; // 1, 2 or 4
    int groups;
    int sequence_threads;
    int chunk;
    int chunks;
    int warps; // in a group; 1 if the group is part of a warp
    int rank_tile;
    int state_tile;
    bool resident;
    int map_pitch;
    int map_size;
    bool stage_tiled; // columns are staged as tiles of the map; else in the order of the scan
    int stage_pitch;
    int stage_row;
    int tiles;           // of channels
    std::int64_t blocks; // tiles * batch
    // Offsets in shared memory, in bytes.
    int weights_at;
    int totals_at;
    int carries_at;
    int skips_at;
    int x_at;
    int stage_at;
    int shared_bytes;
    // Of the kernels in tensor_core/; their blocks and threads are those above.
    int kernels; // QuartermapKernels
    int stage;          // of the resident kernel, in its table
    int parts;          // blocks among which a direction is divided
    int rank_blocks;    // of 8 ranks
    int prepare_blocks; // of the kernel before

    int channels() const
    {
        return groups * channels_per_thread;
    }
    int threads() const
    {
        return groups * sequence_threads;
    }
};

struct DeviceLimits
{
    int multiprocessors;
    std::int64_t shared_per_block;
    std::int64_t shared_per_multiprocessor;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b)
{
    return (a + b - 1) / b;
}

inline std::int64_t element_bytes(int element_type)
{
    return element_type == QUARTERMAP_FLOAT32 ? 4 : 2;
}

// The least pitch from `from` on, within `slack`, with which a warp that walks along columns meets the banks most evenly.
inline int choose_pitch(int from, int slack, int inner_size, int sequence_threads, int bytes)
{
    int best = from;
    int best_conflicts = 1 << 30;
    int const lanes = std::min(sequence_threads, 32);
    for (int pitch = from; pitch <= from + slack; ++pitch)
    {
        int hits[32] = {};
        int conflicts = 0;
        std::int64_t words[32];
        for (int lane = 0; lane < lanes; ++lane)
        {
            int const q = lane * kPositions;
            words[lane] = (static_cast<std::int64_t>(q % inner_size) * pitch + q / inner_size) * bytes / 4;
            bool seen = false; // the same word is no conflict
            for (int other = 0; other < lane; ++other)
            {
                seen = seen || words[other] == words[lane];
            }
            if (!seen)
            {
                conflicts = std::max(conflicts, ++hits[words[lane] & 31]);
            }
        }
        if (conflicts < best_conflicts)
        {
            best = pitch;
            best_conflicts = conflicts;
        }
        if (conflicts == 1)
        {
            break;
        }
    }
    return best;
}

// Fills a plan for one way to divide the work; false when it does not fit.
inline bool divide(QuartermapScan const& scan, std::int64_t shared_limit, int channels_per_thread, int groups,
    int most_warps, bool resident, LaunchPlan& plan)
{
    std::int64_t const length = scan.height * scan.width;
    int const height = static_cast<int>(scan.height);
    int const width = static_cast<int>(scan.width);
    int const bytes = static_cast<int>(element_bytes(scan.element_type));
    std::int64_t const needed = ceil_div(length, kPositions);
    plan.channels_per_thread = channels_per_thread;
    plan.groups = groups;
    plan.resident = resident;
    plan.warps = 1;
    if (needed <= 32)
    {
        plan.sequence_threads = needed <= 8 ? 8 : needed <= 16 ? 16 : 32;
    }
    else
    {
        std::int64_t const warps = ceil_div(needed, 32);
        std::int64_t const rounds = ceil_div(warps, most_warps);
        plan.warps = static_cast<int>(ceil_div(warps, rounds));
        plan.sequence_threads = 32 * plan.warps;
    }
    if (plan.threads() % 32 != 0 || plan.threads() > kMaxThreads)
    {
        return false;
    }
    plan.chunk = plan.sequence_threads * kPositions;
    plan.chunks = static_cast<int>(ceil_div(length, plan.chunk));

    int const staged = static_cast<int>(std::min<std::int64_t>(plan.chunk, length));
    bool const has_column = [&] {
        for (int k = 0; k < scan.direction_count; ++k)
        {
            if (scan.directions[k] & 1)
            {
                return true;
            }
        }
        return false;
    }();
    // Columns that a chunk can touch: one more than it holds, unless chunks begin where columns begin.
    std::int64_t const touched = staged % height == 0 ? staged / height : (staged + height - 2) / height + 1;
    int const columns = static_cast<int>(std::min<std::int64_t>(width, touched));
    plan.stage_pitch = choose_pitch(columns, 31, height, plan.sequence_threads, bytes);
    std::int64_t const tile = static_cast<std::int64_t>(height) * plan.stage_pitch;
    plan.stage_tiled = has_column && tile <= 2 * static_cast<std::int64_t>(staged);
    plan.stage_row = plan.stage_tiled ? std::max<int>(staged, static_cast<int>(tile)) : staged;
    plan.stage_row += plan.stage_row & 1; // whole words for types of two bytes
    plan.map_pitch = resident && has_column ? choose_pitch(width, 8, height, plan.sequence_threads, 4) : width;
    std::int64_t const map_size = static_cast<std::int64_t>(height) * plan.map_pitch;
    std::int64_t const channels = plan.channels();
    if (resident && channels * map_size * (4 + bytes) > shared_limit)
    {
        return false;
    }
    plan.map_size = static_cast<int>(map_size);

    plan.state_tile = static_cast<int>(std::min<std::int64_t>(scan.d_state, 4));
    std::int64_t const rank = scan.dt_rank;
    plan.rank_tile = static_cast<int>(rank > 0 ? std::min<std::int64_t>(rank, 8) : channels);

    std::int64_t at = resident ? channels * map_size * 4 : 0;
    auto const place = [&at](int& offset, std::int64_t size) {
        offset = static_cast<int>(at);
        at = ceil_div(at + size, 16) * 16;
    };
    at = ceil_div(at, 16) * 16;
    place(plan.weights_at, rank * channels * 4);
    place(plan.totals_at, plan.warps > 1 ? 2 * channels * plan.warps * 8 : 0);
    place(plan.carries_at, scan.d_state > 1 ? 2 * channels * scan.d_state * 4 : 0);
    place(plan.skips_at, channels * 4);
    place(plan.x_at, resident ? channels * map_size * bytes : 0);
    std::int64_t const rows = plan.rank_tile + 2 * plan.state_tile;
    place(plan.stage_at, rows * plan.stage_row * bytes);
    if (at > shared_limit)
    {
        return false;
    }
    plan.shared_bytes = static_cast<int>(at);
    plan.tiles = static_cast<int>(ceil_div(scan.d_inner, channels));
    plan.blocks = plan.tiles * scan.batch;
    return true;
}

// Estimated instructions of the busiest multiprocessor, in arbitrary units: what the plans are compared by. Counted in the
// machine code for compute capability 9.0, for each position of a channel in a direction; what the channels of a thread or
// of a block share is divided among them. Not measured on a GPU.
inline double estimate(QuartermapScan const& scan, DeviceLimits const& limits, LaunchPlan const& plan)
{
    double const channels_per_thread = plan.channels_per_thread;
    double const channels = plan.channels();
    double const states = static_cast<double>(scan.d_state);
    double const rank = static_cast<double>(scan.dt_rank);
    double const staged = (rank > 0 ? rank : channels) + 2.0 * states;
    double const position = 23.0 + 48.0 / channels_per_thread + rank * (1.0 + 4.2 / channels_per_thread)
        + states * (12.0 + 8.0 / channels_per_thread) + (45.0 + 6.5 * staged) / channels;
    double const chunk = plan.threads() * kPositions * channels_per_thread * position;
    // And reading x and writing y, once for all directions.
    double const block = chunk * plan.chunks * scan.direction_count + 40.0 * plan.map_size * channels;
    std::int64_t const by_memory = limits.shared_per_multiprocessor / (plan.shared_bytes + 1024);
    std::int64_t const by_registers = 512 / std::max(plan.threads(), 1);
    std::int64_t const most = std::max<std::int64_t>(1, std::min(by_memory, std::max<std::int64_t>(by_registers, 1)));
    std::int64_t const wanted = ceil_div(plan.blocks, limits.multiprocessors);
    std::int64_t const turns = ceil_div(wanted, most);
    // What the multiprocessor has to issue, and what the threads of one block wait for their own results, turn by turn:
    // with 16 warps the second is half of the first. So work is spread while multiprocessors are idle.
    return static_cast<double>(wanted) * block + static_cast<double>(turns) * block / plan.threads() * 256.0;
}

// The best plan for a device; false if the scan does not fit its shared memory even with the maps in global memory.
inline bool make_plan(QuartermapScan const& scan, DeviceLimits const& limits, LaunchPlan& best)
{
    // With several states, twice as many values are alive in registers.
    int const most_channels = scan.d_state == 1 ? 4 : 2;
    bool found = false;
    double least = 0.0;
    for (int channels = most_channels; channels >= 1; channels /= 2)
    {
        for (int groups = 32; groups >= 1; groups /= 2)
        {
            for (int warps = kMaxWarps; warps >= 1; warps /= 2)
            {
                LaunchPlan plan{};
                // A last tile that is mostly empty is work for nothing; one group always has to be possible.
                bool const excess = channels * groups >= 2 * scan.d_inner && groups > 4;
                if (excess || !divide(scan, limits.shared_per_block, channels, groups, warps, true, plan))
                {
                    continue;
                }
                double const cost = estimate(scan, limits, plan);
                if (!found || cost < least)
                {
                    best = plan;
                    least = cost;
                    found = true;
                }
            }
        }
    }
    for (int warps = kMaxWarps; warps >= 1 && !found; warps /= 2)
    {
        found = divide(scan, limits.shared_per_block, 1, 1, warps, false, best);
    }
    return found;
}

// Whether the maps of one channel may not fit the shared memory of some device.
inline bool may_need_workspace(QuartermapScan const& scan)
{
    std::int64_t const pitch = scan.width + 8;
    return scan.height * pitch * (4 + element_bytes(scan.element_type)) > kAlwaysResidentBytes;
}

} // namespace quartermap
