// The kernels for small batches, and for maps that no block can hold.
//
//   split      a block has one direction of 16 channels of one image, or one chunk of it, and writes what that gives;
//              another launch adds up the directions
//   streamed   a block has all directions of them, one after the other, and adds each to y in global memory, which it
//              finds in the cache again
//
// With one state the blocks of ranks are known to the compiler; with several, where the time step is a small share of the
// work, one kernel takes any number.
#pragma once

#include "float32_scan.h"
#include "plan.h"
#include "states_walk.h"

namespace quartermap
{
namespace tensor_core
{

// Of the block's number: first the direction, then the channels, then the image; the chunks of one direction follow
// each other, so that a block waits for no later one.
struct SplitBlock
{
    bool streamed;
    int chunk; // 0 where a block has all chunks
    int k;     // the first, where it has all directions
    int tile;
    int image;

    QUARTERMAP_DEVICE explicit SplitBlock(KernelArguments const& arguments)
    {
        unsigned rest = block_index();
        auto const take = [&rest](int count) {
            auto const all = static_cast<unsigned>(count);
            int const found = static_cast<int>(rest % all);
            rest /= all;
            return found;
        };
        streamed = arguments.plan.kernels == QUARTERMAP_STREAMED;
        chunk = take(arguments.plan.parts);
        k = take(streamed ? 1 : arguments.scan.direction_count);
        tile = take(arguments.plan.tiles);
        image = static_cast<int>(rest);
    }
};

template <bool kStates, bool kColumn, bool kReverse, typename T, class G>
QUARTERMAP_DEVICE void walk_split(
    G const& g, KernelArguments const& arguments, SplitBlock const& block, int k, Team const& team)
{
    std::int64_t const channels = arguments.scan.d_inner;
    std::int64_t const channel = block.image * channels + block.tile * kChannels;
    T const* const x = static_cast<T const*>(arguments.tensors.x) + channel * g.height * g.width;
    std::int64_t const of_direction = k * arguments.scan.batch * channels;
    T* const part = block.streamed
        ? static_cast<T*>(arguments.tensors.y) + channel * g.height * g.width
        : static_cast<T*>(arguments.buffers.parts) + (of_direction + channel) * g.height * g.pitch;

    Chunks chunks{0, g.chunks, -1};
    int const states = kStates ? static_cast<int>(arguments.scan.d_state) : 1;
    Neighbours neighbours{nullptr, nullptr, states};
    if (arguments.plan.parts > 1)
    {
        chunks = {block.chunk, block.chunk + 1, -1};
        // There are no more than `told_count`.
        int const line = (block.image * arguments.plan.tiles + block.tile) * arguments.scan.direction_count + k;
        int const first = line * g.chunks * (kChannels * states);
        neighbours = {arguments.buffers.maps + 2ll * first, arguments.buffers.told + first, states};
    }
    Lane const lane(team.lane);
    Source<T> const source(g, arguments.tensors, block.image, arguments.scan.direction_count, k, states);
    GlobalMaps<T> const maps{x, part, block.streamed};
    if constexpr (kStates)
    {
        StateParameters<T> const parameters(arguments, block.tile * kChannels, k, lane);
        walk_states<kColumn, kReverse>(g, source, parameters, maps, team, chunks, neighbours);
    }
    else
    {
        auto const parameters = load_parameters<T, G>(arguments, block.tile * kChannels, k, lane);
        walk<kColumn, kReverse>(g, source, parameters, maps, team, chunks, neighbours);
    }
}

// Begins y with the skip connection. Rows are of even width.
template <typename T>
QUARTERMAP_DEVICE void begin_streamed(KernelArguments const& arguments, SplitBlock const& block, int positions)
{
    std::int64_t const channel = block.image * arguments.scan.d_inner + block.tile * kChannels;
    QUARTERMAP_NO_UNROLL
    for (int c = 0; c < kChannels; ++c)
    {
        T const* const x = static_cast<T const*>(arguments.tensors.x) + (channel + c) * positions;
        T* const y = static_cast<T*>(arguments.tensors.y) + (channel + c) * positions;
        float const skip = read_only(arguments.buffers.skip + block.tile * kChannels + c);
        QUARTERMAP_UNROLL_BY_4
        for (int pair = thread_index(); pair < positions / 2; pair += thread_count())
        {
            Word word[1];
            load_words(x + 2 * pair, word);
            word[0] = pack<T>(low_of<T>(word[0]) * skip, high_of<T>(word[0]) * skip);
            store_words(y + 2 * pair, word);
        }
    }
}

// Looks at y, and computes it anew where it is not finite: in so many floats at a time as a warp has shared memory for.
template <typename T>
QUARTERMAP_DEVICE void end_streamed(
    KernelArguments const& arguments, SplitBlock const& block, int positions, Team const& team, int shared_bytes)
{
    std::int64_t const channel = block.image * arguments.scan.d_inner + block.tile * kChannels;
    T* const y = static_cast<T*>(arguments.tensors.y) + channel * positions;
    Word seen = 0u;
    QUARTERMAP_UNROLL_BY_4
    for (int line = thread_index(); line < kChannels / 8 * positions; line += thread_count())
    {
        Word words[4];
        load_own(y + 8 * line, words);
        seen = watch_all<T>(seen, words);
    }
    if (!any_of_block<Barrier::kAllFinite>(!all_finite(seen)))
    {
        return;
    }
    int const warps = arguments.plan.warps;
    int const floats = shared_bytes / (4 * warps);
    QUARTERMAP_NO_UNROLL
    for (int own = team.warp; own < kChannels; own += warps)
    {
        QUARTERMAP_NO_UNROLL
        for (int first = 0; first < positions; first += floats)
        {
            int const count = positions - first < floats ? positions - first : floats;
            compute_in_float32<T>(arguments, Stretch{block.image, block.tile * kChannels + own, first, count},
                static_cast<Shared>(team.buffers + 4 * floats * team.warp), team.lane);
        }
    }
}

template <bool kStates, typename T, int kRankBlocks, int kTiles, bool kOdd>
QUARTERMAP_DEVICE void walk_directions(KernelArguments const& arguments)
{
    SplitGeometry<kRankBlocks, kTiles, kOdd> const g(static_cast<int>(arguments.scan.height),
        static_cast<int>(arguments.scan.width), static_cast<int>(arguments.scan.dt_rank), arguments.plan.warps,
        kStates ? static_cast<int>(arguments.scan.d_state) : 1);
    Shared const base = shared_begin();
    Team const team{base, base, base, thread_index() >> 5, thread_index() & 31, 1};
    if (team.lane < (kStates ? 2 : 1) * kTiles)
    {
        write_shared(base + team.warp * g.warp_bytes + g.bc_at + team.lane * kTileBytes + kZeroAt, 0.0F, 0.0F);
    }

    SplitBlock const block(arguments);
    if (block.streamed)
    {
        begin_streamed<T>(arguments, block, g.height * g.width); // the walk's first barrier comes before it is added to
    }
    int const end = block.streamed ? arguments.scan.direction_count : block.k + 1;
    QUARTERMAP_NO_UNROLL
    for (int k = block.k; k < end; ++k)
    {
        switch (arguments.scan.directions[k])
        {
        case QUARTERMAP_ROW: walk_split<kStates, false, false, T>(g, arguments, block, k, team); break;
        case QUARTERMAP_COLUMN: walk_split<kStates, true, false, T>(g, arguments, block, k, team); break;
        case QUARTERMAP_ROW_REVERSE: walk_split<kStates, false, true, T>(g, arguments, block, k, team); break;
        default: walk_split<kStates, true, true, T>(g, arguments, block, k, team); break;
        }
        wait_for_block<Barrier::kDirectionAdded>();
    }
    if (block.streamed)
    {
        end_streamed<T>(arguments, block, g.height * g.width, team, g.shared_bytes);
    }
}

template <typename T, int kRankBlocks, int kTiles, bool kOdd>
QUARTERMAP_KERNEL(32 * kMostSplitWarps, split_blocks(kIsFloat16<T>, kRankBlocks, kTiles, kOdd))
void split_kernel(KernelArguments const arguments)
{
    walk_directions<false, T, kRankBlocks, kTiles, kOdd>(arguments);
}

template <typename T, int kTiles, bool kOdd>
QUARTERMAP_KERNEL(32 * kMostSplitWarps, states_blocks(kIsFloat16<T>, kTiles, kOdd))
void states_kernel(KernelArguments const arguments)
{
    walk_directions<true, T, 1, kTiles, kOdd>(arguments);
}

// Two neighbours of a row, of which the second may not be there. Rows of even width begin at words.
template <typename T>
QUARTERMAP_DEVICE Word load_neighbours(T const* from, int width, bool second)
{
    if (width % 2 == 0)
    {
        Word both[1];
        load_words(from, both);
        return both[0];
    }
    return load_half(from) | (second ? load_half(from + 1) << 16 : 0u);
}

// Returns whether what is stored is finite.
template <typename T>
QUARTERMAP_DEVICE bool store_neighbours(T* to, int width, bool second, Word value)
{
    bool const finite = all_finite(watch<T>(0u, second ? value : value & 0xffffu));
    if (width % 2 == 0)
    {
        Word const both[1] = {value};
        store_words(to, both);
        return finite;
    }
    store_half(to, value);
    if (second)
    {
        store_half(to + 1, value >> 16);
    }
    return finite;
}

// Adds up the directions for the `own`-th pair of neighbours of a row, of all maps; returns whether y is finite.
template <typename T>
QUARTERMAP_DEVICE bool sum_pair(KernelArguments const& arguments, std::int64_t own)
{
    int const width = static_cast<int>(arguments.scan.width);
    int const pairs_of_row = (width + 1) / 2;
    auto const pairs = static_cast<unsigned>(arguments.scan.height * pairs_of_row);
    std::int64_t const maps = arguments.scan.batch * arguments.scan.d_inner;
    std::int64_t const map = own / pairs;
    int const pair = static_cast<int>(own % pairs);
    int const row = pair / pairs_of_row;
    int const column = 2 * (pair - row * pairs_of_row);
    bool const second = column + 1 < width;
    std::int64_t const at = (map * arguments.scan.height + row) * width + column;
    T const* const x = static_cast<T const*>(arguments.tensors.x) + at;
    float const skip = read_only(arguments.buffers.skip + map % arguments.scan.d_inner);
    Word const found = load_neighbours(x, width, second);
    float low = skip * low_of<T>(found);
    float high = skip * high_of<T>(found);
    T const* const parts = static_cast<T const*>(arguments.buffers.parts);
    for (int k = 0; k < arguments.scan.direction_count; ++k)
    {
        Word part[1];
        load_words(parts + 2 * (k * maps * pairs + own), part);
        low += low_of<T>(part[0]);
        high += high_of<T>(part[0]);
    }
    return store_neighbours(static_cast<T*>(arguments.tensors.y) + at, width, second, pack<T>(low, high));
}

// y = D x + the parts of the directions; computed anew where that is not finite, map after map of the block.
template <typename T>
QUARTERMAP_KERNEL(kSmallThreads, 1)
void sum_kernel(KernelArguments const arguments)
{
    int const width = static_cast<int>(arguments.scan.width);
    int const pairs_of_row = (width + 1) / 2;
    std::int64_t const pairs = arguments.scan.height * pairs_of_row;
    std::int64_t const all = arguments.scan.batch * arguments.scan.d_inner * pairs;
    std::int64_t const first = static_cast<std::int64_t>(block_index()) * kSmallThreads;
    std::int64_t const own = first + thread_index();
    bool const finite = own >= all || sum_pair<T>(arguments, own);
    if (!any_of_block<Barrier::kAllFinite>(!finite))
    {
        return;
    }
    std::int64_t const end = first + kSmallThreads < all ? first + kSmallThreads : all;
    int const warp = thread_index() >> 5;
    QUARTERMAP_NO_UNROLL
    for (std::int64_t map = first / pairs + warp; map * pairs < end; map += kSmallThreads / 32)
    {
        std::int64_t const begin = map * pairs < first ? first - map * pairs : 0;
        std::int64_t const behind = (map + 1) * pairs < end ? pairs : end - map * pairs;
        auto const position = [&](std::int64_t pair) {
            return static_cast<int>(pair / pairs_of_row * width + pair % pairs_of_row * 2);
        };
        Stretch const stretch{map / arguments.scan.d_inner, static_cast<int>(map % arguments.scan.d_inner),
            position(begin), position(behind) - position(begin)};
        auto const sums = static_cast<Shared>(shared_begin() + 8 * (map * pairs + begin - first));
        compute_in_float32<T>(arguments, stretch, sums, thread_index() & 31);
    }
}

} // namespace tensor_core
} // namespace quartermap
