// Where a lane finds x, and where it adds the output: in shared memory, or in global memory.
#pragma once

#include "source.h"

namespace quartermap
{
namespace tensor_core
{

// Adds states x C to two pairs of outputs, of channels g and g + 8.
template <typename T>
QUARTERMAP_DEVICE void add_output(Word (&sum)[2], float const (&states)[4], Word c)
{
    Word const first = pack<T>(states[0], states[1]);
    Word const second = pack<T>(states[2], states[3]);
    if constexpr (kIsFloat16<T>)
    {
        add_matrix_product_16(sum, first, second, c);
    }
    else
    {
        float whole[4];
        matrix_product<T>(whole, first, second, c, low_of<T>(sum[0]), high_of<T>(sum[0]), low_of<T>(sum[1]),
            high_of<T>(sum[1]));
        sum[0] = pack<T>(whole[0], whole[1]);
        sum[1] = pack<T>(whole[2], whole[3]);
    }
}

// x and the sum over the directions, of the 16 channels of a group, in shared memory.
struct ResidentMaps
{
    Shared x;
    int sum_behind;
};

template <bool kColumn, typename T, class G>
struct ResidentPlaces
{
    Shared x_at;
    Shared sum_at;

    QUARTERMAP_DEVICE ResidentPlaces(G const& g, ResidentMaps const& maps, Lane lane, Slot slot)
        : x_at(maps.x + lane.g * g.map_bytes + slot.first * 2)
        , sum_at(x_at + maps.sum_behind)
    {
    }

    QUARTERMAP_DEVICE void read_x(G const& g, int j, Word (&x)[2]) const
    {
        Shared const at = x_at + j * tile_step<kColumn>(g) * 2;
        x[0] = read_shared(at);
        x[1] = read_shared(at + 8 * g.map_bytes);
    }

    QUARTERMAP_DEVICE void add(G const& g, int j, float const (&states)[4], Word c, bool live) const
    {
        Shared const at = sum_at + j * tile_step<kColumn>(g) * 2;
        Word sum[2] = {read_shared(at), read_shared(at + 8 * g.map_bytes)};
        add_output<T>(sum, states, c);
        if (live)
        {
            write_shared(at, sum[0]);
            write_shared(at + 8 * g.map_bytes, sum[1]);
        }
    }
};

// x of the block's channels in global memory, and the place for what one direction gives, whose rows have the map's
// pitch; or y, to which it is added.
template <typename T>
struct GlobalMaps
{
    T const* x;
    T* part;
    bool adds;
};

template <bool kColumn, typename T, class G>
struct GlobalPlaces
{
    T const* x;
    T* part;
    int first;
    bool adds;

    QUARTERMAP_DEVICE GlobalPlaces(G const& g, GlobalMaps<T> const& maps, Lane lane, Slot slot)
        : x(maps.x + static_cast<std::int64_t>(lane.g) * g.height * g.width + (G::kOdd ? 0 : slot.first))
        , part(maps.part + static_cast<std::int64_t>(lane.g) * g.height * g.pitch + slot.first)
        , first(slot.first)
        , adds(maps.adds)
    {
    }

    QUARTERMAP_DEVICE void read_x(G const& g, int j, Word (&words)[2]) const
    {
        // Where nothing is padded, a distance from the lane's first pair, which along rows the compiler knows.
        int const at = j * tile_step<kColumn>(g);
        Pair const pair = G::kOdd ? Pair::in_map(g, first + at) : Pair{at, true};
        words[0] = load_pair<G>(x, pair);
        words[1] = load_pair<G>(x + 8ll * g.height * g.width, pair);
    }

    // Adds a sum over several states.
    template <class Sum>
    QUARTERMAP_DEVICE void add_sum(G const& g, int j, Sum const& sum, bool live) const
    {
        T* const to = part + j * tile_step<kColumn>(g);
        T* const to_next = to + 8ll * g.height * g.pitch;
        Word before[2] = {0u, 0u};
        if (!G::kOdd && adds)
        {
            before[0] = load_own(to);
            before[1] = load_own(to_next);
        }
        if (live)
        {
            Word const low[1] = {sum.pair_after(before[0], 0)};
            Word const high[1] = {sum.pair_after(before[1], 1)};
            store_words(to, low);
            store_words(to_next, high);
        }
    }

    QUARTERMAP_DEVICE void add(G const& g, int j, float const (&states)[4], Word c, bool live) const
    {
        T* const to = part + j * tile_step<kColumn>(g);
        Word sum[2] = {0u, 0u};
        if (!G::kOdd && adds)
        {
            sum[0] = load_own(to);
            sum[1] = load_own(to + 8ll * g.height * g.pitch);
        }
        add_output<T>(sum, states, c);
        if (live)
        {
            Word const low[1] = {sum[0]};
            Word const high[1] = {sum[1]};
            store_words(to, low);
            store_words(to + 8ll * g.height * g.pitch, high);
        }
    }
};

template <bool kColumn, typename T, class G>
QUARTERMAP_DEVICE ResidentPlaces<kColumn, T, G> places_of(G const& g, ResidentMaps const& maps, Lane lane, Slot slot)
{
    return {g, maps, lane, slot};
}

template <bool kColumn, typename T, class G>
QUARTERMAP_DEVICE GlobalPlaces<kColumn, T, G> places_of(G const& g, GlobalMaps<T> const& maps, Lane lane, Slot slot)
{
    return {g, maps, lane, slot};
}

} // namespace tensor_core
} // namespace quartermap
