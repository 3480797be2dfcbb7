// What a warp reads of one direction: its time steps, B and C, which it stages, and the parameters of its channels.
#pragma once

#include <type_traits>

#include "../kernel_arguments.h"
#include "geometry.h"
#include "machine.h"

namespace quartermap
{
namespace tensor_core
{

constexpr Word kOne = 0x3C00u; // in float16
constexpr Word kHalfLn2 = 0x398Cu;
template <typename T>
constexpr bool kIsFloat16 = std::is_same<T, Float16>::value;

// Two ones.
template <typename T>
QUARTERMAP_DEVICE Word one_pair()
{
    return kIsFloat16<T> ? twice(kOne) : twice(0x3F80u);
}

template <typename T, int kWords>
QUARTERMAP_DEVICE Word watch_all(Word seen, Word const (&words)[kWords])
{
    QUARTERMAP_UNROLL
    for (int n = 0; n < kWords; ++n)
    {
        seen = watch<T>(seen, words[n]);
    }
    return seen;
}

// Whether `watch` saw none but finite values.
QUARTERMAP_INLINE bool all_finite(Word seen)
{
    return (seen & 0x7fff7fffu) == 0u;
}

// A thread's place in its warp: its channels are g and g + 8, its columns 2q and 2q + 1.
struct Lane
{
    int g;
    int q;
    bool diagonal; // it holds places on the diagonal of a matrix of 8 x 8

    QUARTERMAP_INLINE explicit Lane(int lane)
        : g(lane >> 2)
        , q(lane & 3)
        , diagonal((g >> 1) == q)
    {
    }

    // As a right factor, a matrix with this value in float16 on its diagonal.
    QUARTERMAP_INLINE Word diagonal_of(Word value) const
    {
        return !diagonal ? 0u : (g & 1) != 0 ? value << 16 : value;
    }
};

// The maps of one direction of one image, in raster order.
template <typename T>
struct Source
{
    T const* dt;
    T const* b;
    T const* c;

    // `directions` counts those of the scan, of which this is the k-th; B and C have `states` maps each, of which these
    // are the first.
    template <class G>
    QUARTERMAP_DEVICE Source(
        G const& g, QuartermapScanTensors const& tensors, int image, int directions, int k, int states = 1)
    {
        std::int64_t const at = static_cast<std::int64_t>(image * directions + k) * (g.height * g.width);
        dt = static_cast<T const*>(tensors.dt) + at * g.ranks;
        b = static_cast<T const*>(tensors.B) + at * states;
        c = static_cast<T const*>(tensors.C) + at * states;
    }
};

// Where a pair of neighbours lies in a map without padding.
struct Pair
{
    int at;
    bool second; // it is there

    template <class G>
    QUARTERMAP_INLINE static Pair in_map(G const& g, int padded)
    {
        if constexpr (!G::kOdd)
        {
            return {padded, true};
        }
        int const row = padded / g.pitch;
        int const column = padded - row * g.pitch;
        return {row * g.width + column, column + 1 < g.width};
    }
};

template <class G, typename T>
QUARTERMAP_DEVICE Word load_pair(T const* map, Pair pair)
{
    if constexpr (!G::kOdd)
    {
        Word value[1];
        load_words(map + pair.at, value);
        return value[0];
    }
    Word const first = load_half(map + pair.at);
    return pair.second ? first | load_half(map + pair.at + 1) << 16 : first;
}

// What a lane stages of a task: one pair, of all ranks or some of them.
struct StagedPair
{
    int tile;
    int q;
    Pair pair;

    template <bool kColumn, class G>
    QUARTERMAP_DEVICE static StagedPair of(G const& g, int task, int lane)
    {
        constexpr int kPairs = kSlots * G::kTiles;
        int const own = lane < kPairs ? lane : kPairs - 1;
        int const tile = kColumn ? own / kSlots : own % G::kTiles;
        int const q = kColumn ? own % kSlots : own / G::kTiles;
        Slot const slot = slot_of<kColumn>(g, task, q);
        return {tile, q, Pair::in_map(g, slot.first + tile * tile_step<kColumn>(g))};
    }
};

// Stages B (times ln 2 where the type has the digits for it) and C of a pair.
template <typename T>
QUARTERMAP_DEVICE void stage_weights(Word b, Word c, StagedPair const& own, Shared bc)
{
    Word const scaled = kIsFloat16<T> ? multiply<T>(b, twice(kHalfLn2)) : b;
    Word const both[4] = {scaled & 0xffffu, c & 0xffffu, scaled & 0xffff0000u, c & 0xffff0000u};
    write_shared(bc + own.tile * kTileBytes + own.q * 16, both);
}

// Stages all ranks of a pair, whose number is known when the kernel runs.
template <typename T, class G>
QUARTERMAP_DEVICE void stage_ranks(G const& g, Source<T> const& source, StagedPair const& own, Shared stage)
{
    Shared const to = stage + (own.tile * kSlots + own.q) * 4;
    QUARTERMAP_UNROLL_BY_4
    for (int r = 0; r < g.ranks; ++r)
    {
        T const* const row = source.dt + static_cast<std::int64_t>(r) * (g.height * g.width);
        write_shared(to + r * G::kTiles * kRowBytes, load_pair<G>(row, own.pair));
    }
}

// Stages one task: time steps as ranks x positions, B and C. Of its ranks a lane takes each `kStep`-th from `part` on; B
// and C go with part 0.
template <bool kColumn, int kStep, typename T, class G>
QUARTERMAP_DEVICE void stage_task(G const& g, Source<T> const& source, int task, int part, int lane, Shared stage)
{
    StagedPair const own = StagedPair::of<kColumn>(g, task, lane);
    Word b = 0u;
    Word c = 0u;
    if (part == 0)
    {
        b = load_pair<G>(source.b, own.pair);
        c = load_pair<G>(source.c, own.pair);
    }
    if constexpr (G::kResident)
    {
        static_assert(G::ranks % kStep == 0);
        int const length = g.height * g.width;
        T const* const from = source.dt + part * length;
        Shared const to = stage + (own.tile * kSlots + own.q) * 4 + part * G::kTiles * kRowBytes;
        Word values[G::ranks / kStep];
        QUARTERMAP_UNROLL
        for (int r = 0; r < G::ranks / kStep; ++r)
        {
            values[r] = load_pair<G>(from + r * kStep * length, own.pair);
        }
        QUARTERMAP_UNROLL
        for (int r = 0; r < G::ranks / kStep; ++r)
        {
            write_shared(to + r * kStep * G::kTiles * kRowBytes, values[r]);
        }
    }
    else
    {
        stage_ranks(g, source, own, stage);
    }
    if (part == 0)
    {
        stage_weights<T>(b, c, own, stage + g.bc_at);
    }
}

} // namespace tensor_core
} // namespace quartermap
