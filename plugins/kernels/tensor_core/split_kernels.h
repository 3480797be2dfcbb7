// The kernels for small batches, and for maps that no block can hold: a block has one direction of 16 channels of one
// image, or one chunk of it, and writes what that gives; another launch adds up the directions.
#pragma once

#include "plan.h"
#include "walk.h"

namespace quartermap
{
namespace tensor_core
{

// Of the block's number: first the direction, then the channels, then the image; the chunks of one direction follow
// each other, so that a block waits for no later one.
struct SplitBlock
{
    int chunk; // 0 where a block has all chunks
    int k;
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
        chunk = take(arguments.plan.parts);
        k = take(arguments.scan.direction_count);
        tile = take(arguments.plan.tiles);
        image = static_cast<int>(rest);
    }
};

template <bool kColumn, bool kReverse, typename T, class G>
QUARTERMAP_DEVICE void walk_split(
    G const& g, KernelArguments const& arguments, SplitBlock const& block, Team const& team)
{
    std::int64_t const channels = arguments.scan.d_inner;
    std::int64_t const channel = block.image * channels + block.tile * kChannels;
    T const* const x = static_cast<T const*>(arguments.tensors.x) + channel * g.height * g.width;
    std::int64_t const of_direction = block.k * arguments.scan.batch * channels;
    T* const part = static_cast<T*>(arguments.buffers.parts) + (of_direction + channel) * g.height * g.pitch;

    Chunks chunks{0, g.chunks, -1};
    Neighbours neighbours{nullptr, nullptr};
    if (arguments.plan.parts > 1)
    {
        chunks = {block.chunk, block.chunk + 1, -1};
        std::int64_t const tile = static_cast<std::int64_t>(block.image) * arguments.plan.tiles + block.tile;
        std::int64_t const line = tile * arguments.scan.direction_count + block.k;
        neighbours = {arguments.buffers.maps + line * g.chunks * (kChannels * 2),
            arguments.buffers.told + line * g.chunks * kChannels};
    }
    Lane const lane(team.lane);
    auto const parameters = load_parameters<T, G>(arguments, block.tile * kChannels, block.k, lane);
    Source<T> const source(g, arguments.tensors, block.image, arguments.scan.direction_count, block.k);
    walk<kColumn, kReverse>(g, source, parameters, GlobalMaps<T>{x, part}, team, chunks, neighbours);
}

template <typename T, int kRankBlocks, int kTiles, bool kOdd>
QUARTERMAP_KERNEL(32 * kMostSplitWarps, split_blocks(kIsFloat16<T>, kRankBlocks, kTiles, kOdd))
void split_kernel(KernelArguments const arguments)
{
    SplitGeometry<kRankBlocks, kTiles, kOdd> const g(static_cast<int>(arguments.scan.height),
        static_cast<int>(arguments.scan.width), static_cast<int>(arguments.scan.dt_rank), arguments.plan.warps);
    Shared const base = shared_begin();
    Team const team{base, base, base, thread_index() >> 5, thread_index() & 31, 1};
    if (team.lane < kTiles)
    {
        write_shared(base + team.warp * g.warp_bytes + g.bc_at + team.lane * kTileBytes + kZeroAt, 0.0F, 0.0F);
    }

    SplitBlock const block(arguments);
    switch (arguments.scan.directions[block.k])
    {
    case QUARTERMAP_ROW: walk_split<false, false, T>(g, arguments, block, team); break;
    case QUARTERMAP_COLUMN: walk_split<true, false, T>(g, arguments, block, team); break;
    case QUARTERMAP_ROW_REVERSE: walk_split<false, true, T>(g, arguments, block, team); break;
    default: walk_split<true, true, T>(g, arguments, block, team); break;
    }
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

template <typename T>
QUARTERMAP_DEVICE void store_neighbours(T* to, int width, bool second, Word value)
{
    if (width % 2 == 0)
    {
        Word const both[1] = {value};
        store_words(to, both);
        return;
    }
    store_half(to, value);
    if (second)
    {
        store_half(to + 1, value >> 16);
    }
}

// y = D x + the parts of the directions. A thread has two neighbours of a row.
template <typename T>
QUARTERMAP_KERNEL(kSmallThreads, 1)
void sum_kernel(KernelArguments const arguments)
{
    int const width = static_cast<int>(arguments.scan.width);
    int const pairs_of_row = (width + 1) / 2;
    auto const pairs = static_cast<unsigned>(arguments.scan.height * pairs_of_row);
    std::int64_t const maps = arguments.scan.batch * arguments.scan.d_inner;
    std::int64_t const own = static_cast<std::int64_t>(block_index()) * kSmallThreads + thread_index();
    if (own >= maps * pairs)
    {
        return;
    }
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
    store_neighbours(static_cast<T*>(arguments.tensors.y) + at, width, second, pack<T>(low, high));
}

} // namespace tensor_core
} // namespace quartermap
