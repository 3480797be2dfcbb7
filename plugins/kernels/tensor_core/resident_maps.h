// x into shared memory, and y out of it, for the channels of a block.
#pragma once

#include "geometry.h"
#include "source.h"

namespace quartermap
{
namespace tensor_core
{

// The words of a row of 7 and a column more, which is zero, from memory that holds rows of 7.
template <typename T>
QUARTERMAP_DEVICE void load_row_of_7(T const* from, Word (&words)[4])
{
    QUARTERMAP_UNROLL
    for (int n = 0; n < 4; ++n)
    {
        words[n] = load_half(from + 2 * n) | (n < 3 ? load_half(from + 2 * n + 1) << 16 : 0u);
    }
}

// x times the skip weight of all directions.
template <typename T>
QUARTERMAP_DEVICE Word skipped(Word x, float skip)
{
    if constexpr (kIsFloat16<T>)
    {
        return multiply<T>(x, pack<T>(skip, skip));
    }
    return pack<T>(low_of<T>(x) * skip, high_of<T>(x) * skip);
}

// One line of kWords words of a channel, and the beginning of its sum behind it.
template <typename T, class G, int kWords>
QUARTERMAP_DEVICE void put_words(Shared to, Word const (&x)[kWords], float skip)
{
    Word sum[kWords];
    QUARTERMAP_UNROLL
    for (int n = 0; n < kWords; ++n)
    {
        sum[n] = skipped<T>(x[n], skip);
    }
    write_shared(to, x);
    write_shared(to + G::all_maps_bytes, sum);
}

// Words that are read at once: 8 or 4 positions, where the map has a multiple of them.
template <class G>
constexpr int kLine = G::height * G::width % 8 == 0 ? 4 : 2;

// Rows of 7 in the order of the block's threads, as many at once as a thread has.
template <class G>
constexpr int kRowsOfThread = (kChannels * G::kGroups * G::height + G::threads - 1) / G::threads;

template <typename T, class G>
QUARTERMAP_DEVICE void load_rows_of_7(T const* x, float const* skips, Shared base)
{
    QUARTERMAP_UNROLL
    for (int n = 0; n < kRowsOfThread<G>; ++n)
    {
        int const row = n * G::threads + thread_index();
        if (row < kChannels * G::kGroups * G::height)
        {
            int const channel = row / G::height;
            Word words[4];
            load_row_of_7(x + row * 7, words);
            Shared const to = base + channel * G::map_bytes + (row - channel * G::height) * 16;
            put_words<T, G>(to, words, read_only(skips + channel));
        }
    }
}

// Rows of 7 are packed where x was, and leave as whole lines. Returns whether all that this thread stores is finite.
template <typename T, class G>
QUARTERMAP_DEVICE bool store_rows_of_7(T* y, Shared base)
{
    Word seen = 0u;
    QUARTERMAP_UNROLL
    for (int n = 0; n < kRowsOfThread<G>; ++n)
    {
        int const row = n * G::threads + thread_index();
        if (row < kChannels * G::kGroups * G::height)
        {
            int const channel = row / G::height;
            Word words[4];
            read_shared(base + G::all_maps_bytes + channel * G::map_bytes + (row - channel * G::height) * 16, words);
            QUARTERMAP_UNROLL
            for (int i = 0; i < 7; ++i)
            {
                write_shared_half(base + row * 14 + 2 * i, (i & 1) != 0 ? words[i / 2] >> 16 : words[i / 2]);
            }
        }
    }
    wait_for_block<Barrier::kRowsPacked>();
    constexpr int kLines = kChannels * G::kGroups * G::height * G::width / 8;
    QUARTERMAP_UNROLL
    for (int n = 0; n < kLines; n += G::threads)
    {
        int const line = n + thread_index();
        if (line < kLines)
        {
            Word words[4];
            read_shared(base + line * 16, words);
            store_words(y + line * 8, words);
            seen = watch_all<T>(seen, words);
        }
    }
    return all_finite(seen);
}

// Does `each(channel, n)` for all lines of a warp's channels, the n-th of a channel, as many at once as there are
// registers for. kAllLanes: lanes that are left without a line repeat the last, so that the warp stays together.
template <class G, bool kAllLanes, class Each>
QUARTERMAP_DEVICE void for_each_line(int warp, int lane, Each const& each)
{
    constexpr int kAll = kChannels * G::kGroups;
    constexpr int kLines = G::height * G::width / (2 * kLine<G>);
    constexpr int kAtOnce = kAll / G::all_warps < 4 ? (kAll + G::all_warps - 1) / G::all_warps : 4; // channels
    QUARTERMAP_NO_UNROLL
    for (int first = warp; first < kAll; first += kAtOnce * G::all_warps)
    {
        QUARTERMAP_UNROLL
        for (int i = 0; i < kAtOnce; ++i)
        {
            int const channel = first + i * G::all_warps;
            QUARTERMAP_UNROLL
            for (int n = 0; n < kLines; n += 32)
            {
                bool const there = n + 32 <= kLines || n + lane < kLines;
                if ((kAll % (kAtOnce * G::all_warps) == 0 || channel < kAll) && (kAllLanes || there))
                {
                    each(channel, there ? n + lane : kLines - 1);
                }
            }
        }
    }
}

template <typename T, class G>
QUARTERMAP_DEVICE void load_maps(T const* x, float const* skips, Shared base, int warp, int lane)
{
    if constexpr (G::pitch != G::width)
    {
        static_assert(G::width == 7);
        load_rows_of_7<T, G>(x, skips, base);
    }
    else
    {
        for_each_line<G, false>(warp, lane, [&](int channel, int line) {
            Word words[kLine<G>];
            load_words(x + channel * (G::height * G::width) + line * (2 * kLine<G>), words);
            put_words<T, G>(
                base + channel * G::map_bytes + line * (4 * kLine<G>), words, read_only(skips + channel));
        });
    }
}

// Returns whether all that this thread, or others of its warp, store is finite.
template <typename T, class G>
QUARTERMAP_DEVICE bool store_maps(T* y, Shared base, int warp, int lane)
{
    if constexpr (G::pitch != G::width)
    {
        return store_rows_of_7<T, G>(y, base);
    }
    else
    {
        // A product with zeros sees two words at once.
        float seen[4] = {0.0F, 0.0F, 0.0F, 0.0F};
        for_each_line<G, true>(warp, lane, [&](int channel, int line) {
            Word words[kLine<G>];
            read_shared(base + G::all_maps_bytes + channel * G::map_bytes + line * (4 * kLine<G>), words);
            store_words(y + channel * (G::height * G::width) + line * (2 * kLine<G>), words);
            QUARTERMAP_UNROLL
            for (int n = 0; n < kLine<G>; n += 2)
            {
                matrix_product<T>(seen, words[n], words[n + 1], 0u, seen[0], seen[1], seen[2], seen[3]);
            }
        });
        return seen[0] + seen[1] + seen[2] + seen[3] == 0.0F;
    }
}

} // namespace tensor_core
} // namespace quartermap
