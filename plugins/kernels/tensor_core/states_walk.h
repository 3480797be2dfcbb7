// One direction of 16 channels with several states, chunk after chunk, by a team of warps. The time steps of a task are
// made once; then, state after state, as walk.h does it for one:
//
//   1. each warp makes the decays of its positions and composes them with the drives over each segment;
//   2. when all warps have, one walks the segments from the state that was kept, while the others stage B and C of the
//      next state;
//   3. each warp walks its positions again, from the right states, and adds C h to sums in registers.
//
// The drives are made in both walks: a product of matrices costs less than the registers that would keep them.
#pragma once

#include "walk.h"

namespace quartermap
{
namespace tensor_core
{

// What a lane knows of its channels g and g + 8 in a direction.
template <typename T>
struct StateParameters
{
    T const* weight; // prepared, of channel g
    float const* A;
    int rates_at; // in A, of channel g
    float bias[2];
    int rank_blocks;
    int states;
    int channels_behind; // of channel g + 8, in prepared weights

    QUARTERMAP_DEVICE StateParameters(KernelArguments const& arguments, int channel0, int k, Lane lane)
        : rank_blocks(arguments.plan.rank_blocks)
        , states(static_cast<int>(arguments.scan.d_state))
        , channels_behind(8 * 8 * rank_blocks)
    {
        int const row = k * static_cast<int>(arguments.scan.d_inner) + channel0 + lane.g;
        weight = static_cast<T const*>(arguments.buffers.weight) + row * (8 * rank_blocks) + 2 * lane.q;
        A = arguments.tensors.A;
        rates_at = row * states;
        bias[0] = read_only(arguments.buffers.bias + row);
        bias[1] = read_only(arguments.buffers.bias + row + 8);
    }
};

// z of all tiles of a task: 8 ranks at a time, four tiles at once.
template <typename T, class G>
QUARTERMAP_DEVICE void project_all(
    G const& g, StateParameters<T> const& parameters, Shared stage, int lane, float (&z)[G::kTiles][4])
{
    QUARTERMAP_UNROLL
    for (int j = 0; j < G::kTiles; ++j)
    {
        z[j][0] = z[j][1] = parameters.bias[0];
        z[j][2] = z[j][3] = parameters.bias[1];
    }
    QUARTERMAP_NO_UNROLL
    for (int s = 0; s < parameters.rank_blocks; ++s)
    {
        Word first[1];
        Word second[1];
        load_words(parameters.weight + 8 * s, first);
        load_words(parameters.weight + parameters.channels_behind + 8 * s, second);
        Shared const row = rank_row(g, stage, stage, 8 * s + (lane & 7));
        QUARTERMAP_UNROLL
        for (int j0 = 0; j0 < G::kTiles; j0 += 4)
        {
            int const tile = j0 + (lane >> 3) < G::kTiles ? j0 + (lane >> 3) : G::kTiles - 1;
            Word factors[4];
            load_factors(row + tile * kRowBytes, factors);
            QUARTERMAP_UNROLL
            for (int j = j0; j < j0 + 4 && j < G::kTiles; ++j)
            {
                matrix_product<T>(z[j], first[0], second[0], factors[j - j0], z[j][0], z[j][1], z[j][2], z[j][3]);
            }
        }
    }
}

// What a lane keeps of a task for all states, in pairs as Steps has its values.
template <class G>
struct TimeSteps
{
    Word step[G::kTiles][2];
    Word input[G::kTiles][2]; // x times the step; for bfloat16 times ln 2, too
    float total[4];           // sums of the steps over a segment
};

template <typename T, class G>
QUARTERMAP_DEVICE void make_time_steps(float const (&z)[4], Word const (&x)[2], Word scaled_identity, Word summing,
    int j, TimeSteps<G>& steps)
{
    steps.step[j][0] = softplus_pair(z[0], z[1]);
    steps.step[j][1] = softplus_pair(z[2], z[3]);
    make_inputs<T>(steps.step[j], x, scaled_identity, steps.input[j]);
    matrix_product<Float16>(steps.total, steps.step[j][0], steps.step[j][1], summing, steps.total[0], steps.total[1],
        steps.total[2], steps.total[3]);
}

// The decays of a tile for one state, whose rates, as pairs, are those of a lane's channels.
template <class G>
QUARTERMAP_DEVICE void make_decays(
    TimeSteps<G> const& steps, int j, Word const (&rates)[2], Word identity, float (&decay)[4])
{
    float powers[4];
    matrix_product<Float16>(powers, multiply<Float16>(steps.step[j][0], rates[0]),
        multiply<Float16>(steps.step[j][1], rates[1]), identity, 0.0F, 0.0F, 0.0F, 0.0F);
    QUARTERMAP_UNROLL
    for (int i = 0; i < 4; ++i)
    {
        decay[i] = power_of_two(powers[i]);
    }
}

// The sum over the states at a tile: pairs in float16, where they have the digits; else four values in float32.
template <typename T>
struct StateSum
{
    Word pairs[2] = {0u, 0u};
    float values[4] = {0.0F, 0.0F, 0.0F, 0.0F};

    QUARTERMAP_DEVICE void add(float const (&states)[4], Word c)
    {
        Word const first = pack<T>(states[0], states[1]);
        Word const second = pack<T>(states[2], states[3]);
        if constexpr (kIsFloat16<T>)
        {
            add_matrix_product_16(pairs, first, second, c);
        }
        else
        {
            matrix_product<T>(values, first, second, c, values[0], values[1], values[2], values[3]);
        }
    }

    // Of channels g (0) or g + 8 (1), added to what is there.
    QUARTERMAP_DEVICE Word pair_after(Word before, int m) const
    {
        if constexpr (kIsFloat16<T>)
        {
            return multiply_add(pairs[m], twice(kOne), before);
        }
        return pack<T>(low_of<T>(before) + values[2 * m], high_of<T>(before) + values[2 * m + 1]);
    }
};

template <bool kColumn, bool kReverse, typename T, class G>
QUARTERMAP_DEVICE void walk_states(G const& g, Source<T> const& source, StateParameters<T> const& parameters,
    GlobalMaps<T> const& maps, Team const& team, Chunks chunks, Neighbours const& neighbours)
{
    Lane const lane(team.lane);
    Word const identity = lane.diagonal_of(kOne);
    Word const scaled_identity = lane.diagonal_of(kHalfLn2);
    Word const summing = kColumn ? identity : lane.diagonal ? twice(kOne) : 0u;
    constexpr int kOther = G::kTiles * kTileBytes; // from B and C of one state to those of the next
    int const length = g.height * g.width;
    int turn = 0; // the warp that walks the segments; another each time, as it takes a while
    Shared const stage = team.buffers + team.warp * g.warp_bytes;

    QUARTERMAP_NO_UNROLL
    for (int chunk = chunks.first; chunk < chunks.end; ++chunk)
    {
        int const task = (kReverse ? g.chunks - 1 - chunk : chunk) * g.warps + team.warp;
        Slot const slot = slot_of<kColumn>(g, task, lane.q);
        StagedPair const own = StagedPair::of<kColumn>(g, task, team.lane);
        stage_ranks(g, source, own, stage);
        Pair pair = own.pair; // of the state that is staged
        stage_weights<T>(load_pair<G>(source.b, pair), load_pair<G>(source.c, pair), own, stage + g.bc_at);
        wait_for_warp<Barrier::kTaskStaged>();

        auto const places = places_of<kColumn, T>(g, maps, lane, slot);
        TimeSteps<G> steps;
        float z[G::kTiles][4];
        project_all(g, parameters, stage, team.lane, z);
        QUARTERMAP_UNROLL
        for (int i = 0; i < 4; ++i)
        {
            steps.total[i] = 0.0F;
        }
        QUARTERMAP_UNROLL
        for (int j = 0; j < G::kTiles; ++j)
        {
            scale_to_powers_of_two<T>(z[j]);
            leave_out_padding<kColumn>(g, slot, j, z[j]);
            Word x[2];
            places.read_x(g, j, x);
            make_time_steps<T>(z[j], x, scaled_identity, summing, j, steps);
        }

        StateSum<T> sums[G::kTiles];
        auto const segments = OwnSegments::of<kColumn>(g, team.buffers, team.warp, lane);
        Shared bc = stage + g.bc_at + (lane.diagonal ? lane.g * 8 : kZeroAt);
        int rates_at = parameters.rates_at;
        QUARTERMAP_NO_UNROLL
        for (int index = 0; index < parameters.states; ++index)
        {
            Word rates[2];
            QUARTERMAP_UNROLL
            for (int m = 0; m < 2; ++m)
            {
                float const a = read_only(parameters.A + rates_at + 8 * m * parameters.states);
                rates[m] = pack<Float16>(a, a);
            }
            ++rates_at;
            float decay[G::kTiles][4];
            float h[kChains<kColumn>];
            QUARTERMAP_UNROLL
            for (int n = 0; n < G::kTiles; ++n)
            {
                int const j = tile_in_order<kReverse, G>(n);
                make_decays(steps, j, rates, identity, decay[j]);
                float drive[4];
                matrix_product<T>(drive, steps.input[j][0], steps.input[j][1], read_shared(bc + j * kTileBytes), 0.0F,
                    0.0F, 0.0F, 0.0F);
                float unused[4];
                if (n == 0)
                {
                    begin_segments<kColumn, kReverse>(decay[j], drive, h);
                }
                else
                {
                    advance<kColumn, kReverse>(decay[j], drive, h, unused);
                }
            }
            // B and C of the next state come while the warps wait for each other; the last reads its own again.
            pair.at += index + 1 < parameters.states ? length : 0;
            Word const next_b = load_pair<G>(source.b, pair);
            Word const next_c = load_pair<G>(source.c, pair);
            float const first = low_of<Float16>(rates[0]);
            float const second = low_of<Float16>(rates[1]);
            float const exponent[4] = {steps.total[0] * first, steps.total[1] * first, steps.total[2] * second,
                steps.total[3] * second};
            tell_segments<kColumn>(segments, exponent, h, slot.live);
            wait_for_team<Barrier::kSegmentsWritten>(g, team);
            // The other buffer was read last before this barrier, and is read again behind the next.
            stage_weights<T>(next_b, next_c, own, stage + g.bc_at + ((index & 1) != 0 ? 0 : kOther));
            if (team.warp == turn)
            {
                float unused = 0.0F;
                scan_segments<kColumn, kReverse>(g, team, neighbours, chunk, index, chunk == chunks.first, unused);
            }
            turn = turn + 1 == g.warps ? 0 : turn + 1;
            wait_for_team<Barrier::kStatesWritten>(g, team);
            take_states<kColumn>(segments, h);

            QUARTERMAP_UNROLL
            for (int n = 0; n < G::kTiles; ++n)
            {
                int const j = tile_in_order<kReverse, G>(n);
                Word both[2];
                read_shared(bc + j * kTileBytes, both);
                float drive[4];
                matrix_product<T>(drive, steps.input[j][0], steps.input[j][1], both[0], 0.0F, 0.0F, 0.0F, 0.0F);
                float states[4];
                advance<kColumn, kReverse>(decay[j], drive, h, states);
                sums[j].add(states, both[1]);
            }
            bc += (index & 1) != 0 ? -kOther : kOther;
        }
        QUARTERMAP_UNROLL
        for (int j = 0; j < G::kTiles; ++j)
        {
            places.add_sum(g, j, sums[j], slot.live);
        }
        wait_for_warp<Barrier::kTaskDone>();
    }
}

} // namespace tensor_core
} // namespace quartermap
