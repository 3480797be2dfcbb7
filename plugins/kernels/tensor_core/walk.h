// One direction of 16 channels, chunk after chunk, by a team of warps:
//
//   1. each warp stages dt, B and C of its task, unless the block has staged them, and makes decays and drives in
//      registers;
//   2. it composes them over each segment; when all warps have, one walks the segments from the state that was kept;
//   3. each warp walks its positions again, from the right states, and adds C h to the output.
#pragma once

#include "places.h"
#include "segments.h"

namespace quartermap
{
namespace tensor_core
{

struct Team
{
    Shared buffers; // stages and segments of its warps, and the state between chunks
    Shared staged;  // dt, B and C of the direction, where the block stages them
    Shared ones;    // a row of ones, where the bias needs one
    int warp;
    int lane;
    int barrier;
};

struct Chunks
{
    int first;
    int end;
    int middle; // before which the block waits, for two teams
};

// Of other blocks with the same channels and direction, one for each chunk: what a block tells those behind it.
struct Neighbours
{
    float* maps;         // (power, state) of 16 channels for each state of each chunk, in the order of the direction
    std::uint32_t* told; // 16 for each; null where a block has all chunks
    int states;          // of a channel
};

// The `index`-th state of a channel before a chunk, after this block has told its own map. Blocks are numbered in the
// order of the chunks and begin in that order, so those that are waited for are at work or done.
QUARTERMAP_DEVICE float look_back(
    Neighbours const& neighbours, int chunk, int index, int channel, ChunkMap const& own)
{
    int const of_chunk = kChannels * neighbours.states;
    int const first = kChannels * index + channel;
    float* const mine = neighbours.maps + 2 * (first + chunk * of_chunk);
    mine[0] = own.power;
    mine[1] = own.state;
    tell(neighbours.told + first + chunk * of_chunk);
    float state = 0.0F;
    for (int n = 0; n < chunk; ++n)
    {
        wait_until_told<Barrier::kPredecessors>(neighbours.told + first + n * of_chunk);
        float const* const map = neighbours.maps + 2 * (first + n * of_chunk);
        state = load_told(map) * state + load_told(map + 1);
    }
    return state;
}

// Puts the `index`-th states before all segments of a chunk in their places, for one warp; `carry` is where one lane keeps
// the state.
template <bool kColumn, bool kReverse, class G>
QUARTERMAP_DEVICE void scan_segments(
    G const& g, Team const& team, Neighbours const& neighbours, int chunk, int index, bool first, float& carry)
{
    if (team.lane >= kChannels)
    {
        return;
    }
    Shared const from = team.buffers + team.lane * 8;
    Shared const kept = team.buffers + g.state_at + (index * kChannels + team.lane) * 4;
    ChunkMap map = {1.0F, 0.0F};
    if constexpr (G::kResident)
    {
        map.state = g.warps == 1 ? carry : first ? 0.0F : read_shared_float(kept);
    }
    else if (neighbours.told != nullptr)
    {
        walk_segments<kColumn, kReverse, false>(g, from, map);
        map.state = look_back(neighbours, chunk, index, team.lane, map);
    }
    else
    {
        map.state = first ? 0.0F : read_shared_float(kept);
    }
    walk_segments<kColumn, kReverse, true>(g, from, map);
    if (G::kResident && g.warps == 1)
    {
        carry = map.state;
    }
    else
    {
        write_shared(kept, map.state);
    }
}

// The column that a map of odd width has too many: its time steps are zero, whatever the ranks give.
template <bool kColumn, class G>
QUARTERMAP_DEVICE void leave_out_padding(G const& g, Slot slot, int j, float (&z)[4])
{
    if constexpr (!G::kOdd)
    {
        return;
    }
    int const column = kColumn ? slot.first % g.pitch : (slot.first + 2 * j) % g.pitch;
    bool const absent = column + 1 == g.width;
    z[1] = absent ? -1e4F : z[1];
    z[3] = absent ? -1e4F : z[3];
}

template <Barrier kName, class G>
QUARTERMAP_DEVICE void wait_for_team(G const& g, Team const& team)
{
    if (G::kResident && g.warps == 1)
    {
        wait_for_warp<kName>();
    }
    else
    {
        wait_for_team<kName>(team.barrier, 32 * g.warps);
    }
}

template <bool kColumn, bool kReverse, typename T, class G, class Maps>
QUARTERMAP_DEVICE void walk(G const& g, Source<T> const& source, Parameters<G> const& parameters, Maps const& maps,
    Team const& team, Chunks chunks, Neighbours const& neighbours)
{
    Lane const lane(team.lane);
    Word const identity = lane.diagonal_of(kOne);
    Word const scaled_identity = lane.diagonal_of(kHalfLn2);
    // Adds up both columns of a lane where they follow each other, else each by itself.
    Word const summing = kColumn ? identity : lane.diagonal ? twice(kOne) : 0u;
    float carry = 0.0F;

    QUARTERMAP_NO_UNROLL
    for (int chunk = chunks.first; chunk < chunks.end; ++chunk)
    {
        if (G::kTeams == 2 && chunk == chunks.middle)
        {
            wait_for_block<Barrier::kMiddle>();
        }
        int const task = (kReverse ? g.chunks - 1 - chunk : chunk) * g.warps + team.warp;
        Slot const slot = slot_of<kColumn>(g, task, lane.q);
        Shared stage;
        if constexpr (G::kPrivate)
        {
            stage = team.buffers + team.warp * g.warp_bytes;
            stage_task<kColumn, 1>(g, source, task, 0, team.lane, stage);
            wait_for_warp<Barrier::kTaskStaged>();
        }
        else
        {
            stage = team.staged + task * G::task_bytes;
        }
        Shared const bc = stage + g.bc_at + (lane.diagonal ? lane.g * 8 : kZeroAt);
        auto const places = places_of<kColumn, T>(g, maps, lane, slot);

        Steps<G> steps;
        QUARTERMAP_UNROLL
        for (int i = 0; i < 4; ++i)
        {
            steps.exponent[i] = 0.0F;
        }
        Projector<T, G> projector(g, parameters, stage, team.ones, team.lane);
        QUARTERMAP_UNROLL
        for (int j = 0; j < G::kTiles; ++j)
        {
            float z[4];
            projector.project(j, z);
            scale_to_powers_of_two<T>(z);
            leave_out_padding<kColumn>(g, slot, j, z);
            Word x[2];
            places.read_x(g, j, x);
            make_steps<T>(
                z, parameters, x, read_shared(bc + j * kTileBytes), identity, scaled_identity, summing, j, steps);
        }

        float h[kChains<kColumn>];
        compose_segments<kColumn, kReverse>(steps, h);
        if constexpr (G::kResident && G::kPrivate)
        {
            wait_for_warp<Barrier::kStageRead>();
        }
        auto const own = OwnSegments::of<kColumn>(g, team.buffers, team.warp, lane);
        tell_segments<kColumn>(own, steps.exponent, h, slot.live);
        wait_for_team<Barrier::kSegmentsWritten>(g, team);
        // Another warp each time, as it takes a while.
        if (g.warps == 1 || team.warp == chunk % g.warps)
        {
            scan_segments<kColumn, kReverse>(g, team, neighbours, chunk, 0, chunk == chunks.first, carry);
        }
        wait_for_team<Barrier::kStatesWritten>(g, team);
        take_states<kColumn>(own, h);

        QUARTERMAP_UNROLL
        for (int n = 0; n < G::kTiles; ++n)
        {
            int const j = tile_in_order<kReverse, G>(n);
            float states[4];
            advance<kColumn, kReverse>(steps.decay[j], steps.drive[j], h, states);
            places.add(g, j, states, read_shared(bc + j * kTileBytes + 4), slot.live);
        }
        if constexpr (G::kPrivate)
        {
            wait_for_warp<Barrier::kTaskDone>();
        }
    }
}

} // namespace tensor_core
} // namespace quartermap
