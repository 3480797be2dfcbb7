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

    // `directions` counts those of the scan, of which this is the k-th.
    template <class G>
    QUARTERMAP_DEVICE Source(G const& g, QuartermapScanTensors const& tensors, int image, int directions, int k)
    {
        std::int64_t const at = static_cast<std::int64_t>(image * directions + k) * (g.height * g.width);
        dt = static_cast<T const*>(tensors.dt) + at * g.ranks;
        b = static_cast<T const*>(tensors.B) + at;
        c = static_cast<T const*>(tensors.C) + at;
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

// Stages one task: time steps as ranks x positions, B (times ln 2 where the type has the digits for it) and C. A lane
// takes one pair, and of its ranks each `kStep`-th from `part` on; B and C go with part 0.
template <bool kColumn, int kStep, typename T, class G>
QUARTERMAP_DEVICE void stage_task(G const& g, Source<T> const& source, int task, int part, int lane, Shared stage)
{
    constexpr int kPairs = kSlots * G::kTiles;
    int const own = lane < kPairs ? lane : kPairs - 1;
    int const tile = kColumn ? own / kSlots : own % G::kTiles;
    int const q = kColumn ? own % kSlots : own / G::kTiles;
    Slot const slot = slot_of<kColumn>(g, task, q);
    Pair const pair = Pair::in_map(g, slot.first + tile * tile_step<kColumn>(g));
    int const length = g.height * g.width;
    T const* const from = source.dt + part * length;
    Shared const to = stage + (tile * kSlots + q) * 4 + part * G::kTiles * kRowBytes;
    Word both[4];
    if (part == 0)
    {
        Word const b = load_pair<G>(source.b, pair);
        Word const c = load_pair<G>(source.c, pair);
        Word const scaled = kIsFloat16<T> ? multiply<T>(b, twice(kHalfLn2)) : b;
        both[0] = scaled & 0xffffu;
        both[1] = c & 0xffffu;
        both[2] = scaled & 0xffff0000u;
        both[3] = c & 0xffff0000u;
    }
    if constexpr (G::kResident)
    {
        static_assert(G::ranks % kStep == 0);
        Word values[G::ranks / kStep];
        QUARTERMAP_UNROLL
        for (int r = 0; r < G::ranks / kStep; ++r)
        {
            values[r] = load_pair<G>(from + r * kStep * length, pair);
        }
        QUARTERMAP_UNROLL
        for (int r = 0; r < G::ranks / kStep; ++r)
        {
            write_shared(to + r * kStep * G::kTiles * kRowBytes, values[r]);
        }
    }
    else
    {
        QUARTERMAP_UNROLL_BY_4
        for (int r = 0; r < g.ranks; ++r)
        {
            T const* const row = from + static_cast<std::int64_t>(r) * length;
            write_shared(to + r * G::kTiles * kRowBytes, load_pair<G>(row, pair));
        }
    }
    if (part == 0)
    {
        write_shared(stage + g.bc_at + tile * kTileBytes + q * 16, both);
    }
}

} // namespace tensor_core
} // namespace quartermap
