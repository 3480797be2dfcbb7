// The scan over the segments of a chunk: each lane composes the maps h -> a h + b of its segments, 16 lanes of one warp
// walk them all, a channel each, and each lane takes the states before its own.
#pragma once

#include "time_step.h"

namespace quartermap
{
namespace tensor_core
{

// Segments of a lane: along rows one for each of its two channels; along columns one for each channel and column.
template <bool kColumn>
constexpr int kChains = kColumn ? 4 : 2;

// Puts the states of a lane after its positions of a tile into `states`, and the last of each segment into `h`.
template <bool kColumn, bool kReverse>
QUARTERMAP_DEVICE void advance(
    float const (&decay)[4], float const (&drive)[4], float (&h)[kChains<kColumn>], float (&states)[4])
{
    if constexpr (kColumn)
    {
        QUARTERMAP_UNROLL
        for (int i = 0; i < 4; ++i)
        {
            states[i] = h[i] = decay[i] * h[i] + drive[i];
        }
    }
    else
    {
        QUARTERMAP_UNROLL
        for (int m = 0; m < 2; ++m)
        {
            int const first = 2 * m + (kReverse ? 1 : 0);
            int const second = 2 * m + (kReverse ? 0 : 1);
            states[first] = decay[first] * h[m] + drive[first];
            states[second] = h[m] = decay[second] * states[first] + drive[second];
        }
    }
}

// The same after the first tile of a lane's segments, from zero.
template <bool kColumn, bool kReverse>
QUARTERMAP_DEVICE void begin_segments(
    float const (&decay)[4], float const (&drive)[4], float (&h)[kChains<kColumn>])
{
    if constexpr (kColumn)
    {
        QUARTERMAP_UNROLL
        for (int i = 0; i < 4; ++i)
        {
            h[i] = drive[i];
        }
    }
    else
    {
        QUARTERMAP_UNROLL
        for (int m = 0; m < 2; ++m)
        {
            int const first = 2 * m + (kReverse ? 1 : 0);
            int const second = 2 * m + (kReverse ? 0 : 1);
            h[m] = decay[second] * drive[first] + drive[second];
        }
    }
}

// The n-th tile in the order of a direction.
template <bool kReverse, class G>
QUARTERMAP_DEVICE constexpr int tile_in_order(int n)
{
    return kReverse ? G::kTiles - 1 - n : n;
}

// The states at the ends of a lane's segments, from zero.
template <bool kColumn, bool kReverse, class G>
QUARTERMAP_DEVICE void compose_segments(Steps<G> const& steps, float (&h)[kChains<kColumn>])
{
    constexpr int kFirst = tile_in_order<kReverse, G>(0);
    begin_segments<kColumn, kReverse>(steps.decay[kFirst], steps.drive[kFirst], h);
    QUARTERMAP_UNROLL
    for (int n = 1; n < G::kTiles; ++n)
    {
        int const j = tile_in_order<kReverse, G>(n);
        float unused[4];
        advance<kColumn, kReverse>(steps.decay[j], steps.drive[j], h, unused);
    }
}

// Where a lane's segments stand: channel g of both columns; channel g + 8 stands 64 bytes behind.
struct OwnSegments
{
    Shared at[2];

    template <bool kColumn, class G>
    QUARTERMAP_DEVICE static OwnSegments of(G const& g, Shared buffers, int warp, Lane lane)
    {
        OwnSegments found;
        QUARTERMAP_UNROLL
        for (int e = 0; e < 2; ++e)
        {
            int const n = segment_of<kColumn>(g, warp, lane.q, kColumn ? e : 0);
            found.at[e] = buffers + g.segment_at(n, kColumn) + lane.g * 8;
        }
        return found;
    }

    // Of the i-th chain of a lane.
    template <bool kColumn>
    QUARTERMAP_DEVICE Shared of_chain(int i) const
    {
        return kColumn ? at[i & 1] + (i >> 1) * 64 : at[0] + i * 64;
    }
};

// Tells the maps of a lane's segments; those of slots that are not there change nothing. `exponent`: sums over them, as
// Steps has them.
template <bool kColumn>
QUARTERMAP_DEVICE void tell_segments(
    OwnSegments const& own, float const (&exponent)[4], float const (&h)[kChains<kColumn>], bool live)
{
    QUARTERMAP_UNROLL
    for (int i = 0; i < kChains<kColumn>; ++i)
    {
        float const power = power_of_two(exponent[kColumn ? i : 2 * i]);
        write_shared(own.of_chain<kColumn>(i), live ? power : 1.0F, live ? h[i] : 0.0F);
    }
}

// The states before a lane's segments.
template <bool kColumn>
QUARTERMAP_DEVICE void take_states(OwnSegments const& own, float (&h)[kChains<kColumn>])
{
    QUARTERMAP_UNROLL
    for (int i = 0; i < kChains<kColumn>; ++i)
    {
        h[i] = read_shared_float(own.of_chain<kColumn>(i));
    }
}

// The map of a chunk for one channel.
struct ChunkMap
{
    float power;
    float state;
};

// Walks kCount segments, from the n0-th of `count` in the order of the sense. kTell: leaves the state before each in
// its place. Reads them before the first is needed.
template <bool kColumn, bool kReverse, bool kTell, int kCount, class G>
QUARTERMAP_DEVICE void walk_some(G const& g, Shared from, int n0, int count, ChunkMap& map)
{
    float power[kCount];
    float drive[kCount];
    QUARTERMAP_UNROLL
    for (int i = 0; i < kCount; ++i)
    {
        int const n = kReverse ? count - 1 - (n0 + i) : n0 + i;
        read_shared(from + g.segment_at(n, kColumn), power[i], drive[i]);
    }
    QUARTERMAP_UNROLL
    for (int i = 0; i < kCount; ++i)
    {
        int const n = kReverse ? count - 1 - (n0 + i) : n0 + i;
        if constexpr (kTell)
        {
            write_shared(from + g.segment_at(n, kColumn), map.state);
        }
        else
        {
            map.power *= power[i];
        }
        map.state = power[i] * map.state + drive[i];
    }
}

// The segments of a chunk, one after the other; `from` is the place of the channel in the first.
template <bool kColumn, bool kReverse, bool kTell, class G>
QUARTERMAP_DEVICE void walk_segments(G const& g, Shared from, ChunkMap& map)
{
    int const count = (kColumn ? kMostSegments : kSlots) * g.warps;
    if constexpr (G::kResident)
    {
        constexpr int kAtOnce = (kColumn ? kMostSegments : kSlots) * G::warps % 8 == 0 ? 8 : 4;
        QUARTERMAP_UNROLL
        for (int n0 = 0; n0 < count; n0 += kAtOnce)
        {
            walk_some<kColumn, kReverse, kTell, kAtOnce>(g, from, n0, count, map);
        }
    }
    else
    {
        QUARTERMAP_NO_UNROLL
        for (int n0 = 0; n0 < count; n0 += 4)
        {
            walk_some<kColumn, kReverse, kTell, 4>(g, from, n0, count, map);
        }
    }
}

} // namespace tensor_core
} // namespace quartermap
