// The kernel for large batches: a block has x and y of its channels in shared memory, reads the one and writes the
// other once, and walks all four directions.
#pragma once

#include "float32_scan.h"
#include "resident_maps.h"
#include "walk.h"

namespace quartermap
{
namespace tensor_core
{

// A zero behind B and C of every tile, which lanes off the diagonal read.
template <class G>
QUARTERMAP_DEVICE void clear_zeros(G const& g, Shared buffers, Shared staged, int warp, int lane)
{
    if constexpr (G::kPrivate)
    {
        if (lane < G::kTiles)
        {
            write_shared(buffers + warp * g.warp_bytes + g.bc_at + lane * kTileBytes + kZeroAt, 0.0F, 0.0F);
        }
    }
    else
    {
        static_assert(G::tasks * G::kTiles <= G::threads);
        int const tile = thread_index();
        if (tile < G::tasks * G::kTiles)
        {
            Shared const task = staged + tile / G::kTiles * G::task_bytes;
            write_shared(task + g.bc_at + tile % G::kTiles * kTileBytes + kZeroAt, 0.0F, 0.0F);
        }
    }
}

// What does not change between the directions of a block.
template <typename T, class G>
struct Resident
{
    KernelArguments const& arguments;
    ResidentMaps maps;
    Team team;
    int image;
    int channel0;
    int warp; // of the block
};

template <bool kColumn, bool kReverse, typename T, class G>
QUARTERMAP_DEVICE void walk_resident(Resident<T, G> const& block, Chunks chunks)
{
    constexpr int kDirection = (kColumn ? 1 : 0) + (kReverse ? 2 : 0);
    G const g;
    Lane const lane(block.team.lane);
    auto const parameters = load_parameters<T, G>(block.arguments, block.channel0, kDirection, lane);
    Source<T> const source(g, block.arguments.tensors, block.image, 4, kDirection);
    walk<kColumn, kReverse>(
        g, source, parameters, block.maps, block.team, chunks, Neighbours{nullptr, nullptr, 1});
}

// Stages a direction for all groups of the block, and walks it.
template <bool kColumn, bool kReverse, typename T, class G>
QUARTERMAP_DEVICE void stage_and_walk(Resident<T, G> const& block)
{
    constexpr int kDirection = (kColumn ? 1 : 0) + (kReverse ? 2 : 0);
    constexpr int kPerTask = G::all_warps / G::tasks > 1 ? G::all_warps / G::tasks : 1; // warps
    Source<T> const source(G(), block.arguments.tensors, block.image, 4, kDirection);
    QUARTERMAP_NO_UNROLL
    for (int task = block.warp / kPerTask; task < G::tasks; task += G::all_warps / kPerTask)
    {
        stage_task<kColumn, kPerTask>(G(), source, task, block.warp % kPerTask, block.team.lane,
            block.team.staged + task * G::task_bytes);
    }
    wait_for_block<Barrier::kDirectionStaged>();
    walk_resident<kColumn, kReverse>(block, Chunks{0, G::chunks, -1});
}

template <typename T, class G>
QUARTERMAP_DEVICE void walk_directions(Resident<T, G> const& block, int team)
{
    if constexpr (G::kTeams == 2)
    {
        // A direction from the front and its reverse from the back: both wait for each other in the middle, so that no
        // two teams add to the same place.
        wait_for_block<Barrier::kMapsRead>();
        constexpr int kHalf = (G::chunks + 1) / 2;
        Chunks const forwards{0, G::chunks, kHalf};
        Chunks const backwards{0, G::chunks, G::chunks - kHalf};
        if (team == 0)
        {
            walk_resident<false, false>(block, forwards);
        }
        else
        {
            walk_resident<false, true>(block, backwards);
        }
        wait_for_block<Barrier::kOrientationDone>();
        if (team == 0)
        {
            walk_resident<true, false>(block, forwards);
        }
        else
        {
            walk_resident<true, true>(block, backwards);
        }
    }
    else
    {
        stage_and_walk<false, false>(block);
        wait_for_block<Barrier::kDirectionDone>();
        stage_and_walk<false, true>(block);
        wait_for_block<Barrier::kDirectionDone>();
        stage_and_walk<true, false>(block);
        wait_for_block<Barrier::kDirectionDone>();
        stage_and_walk<true, true>(block);
    }
}

template <typename T, class G>
QUARTERMAP_KERNEL(G::threads, G::kBlocks)
void resident_kernel(KernelArguments const arguments)
{
    Shared const base = shared_begin();
    int const lane = thread_index() & 31;
    int const warp = thread_index() >> 5;
    int const group = warp / (G::warps * G::kTeams);
    int const team = warp / G::warps % G::kTeams;
    int const tiles = arguments.plan.tiles;
    int const image = static_cast<int>(block_index()) / tiles;
    int const first_channel = static_cast<int>(block_index()) % tiles * (kChannels * G::kGroups);
    std::int64_t const maps_at
        = (static_cast<std::int64_t>(image) * arguments.scan.d_inner + first_channel) * (G::height * G::width);

    Team const mine{base + G::buffers_at + (group * G::kTeams + team) * G::team_bytes, base + G::stage_at,
        base + G::ones_at, warp % G::warps, lane, 1 + group * G::kTeams + team};
    if (thread_index() < G::kTiles * kRowBytes / 4)
    {
        write_shared(mine.ones + 4 * thread_index(), one_pair<T>());
    }
    clear_zeros(G(), mine.buffers, mine.staged, mine.warp, lane);
    T const* const x = static_cast<T const*>(arguments.tensors.x) + maps_at;
    load_maps<T, G>(x, arguments.buffers.skip + first_channel, base, warp, lane);

    ResidentMaps const maps{base + kChannels * group * G::map_bytes, G::all_maps_bytes};
    walk_directions<T, G>({arguments, maps, mine, image, first_channel + kChannels * group, warp}, team);
    wait_for_block<Barrier::kSumDone>();
    bool const finite = store_maps<T, G>(static_cast<T*>(arguments.tensors.y) + maps_at, base, warp, lane);
    if (any_of_block<Barrier::kAllFinite>(!finite))
    {
        static_assert(4 * G::height * G::width <= 2 * G::map_bytes);
        QUARTERMAP_NO_UNROLL
        for (int channel = warp; channel < kChannels * G::kGroups; channel += G::all_warps)
        {
            Stretch const whole{image, first_channel + channel, 0, G::height * G::width};
            compute_in_float32<T>(arguments, whole, base + channel * 2 * G::map_bytes, lane);
        }
    }
}

} // namespace tensor_core
} // namespace quartermap
