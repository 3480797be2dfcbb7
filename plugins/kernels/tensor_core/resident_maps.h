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

template <typename T, class G>
QUARTERMAP_DEVICE void load_maps(T const* x, float const* skips, Shared base, int warp, int lane)
{
    if constexpr (G::pitch != G::width)
    {
        static_assert(G::width == 7);
        for (int row = thread_index(); row < kChannels * G::kGroups * G::height; row += G::threads)
        {
            int const channel = row / G::height;
            Word words[4];
            load_row_of_7(x + row * 7, words);
            Shared const to = base + channel * G::map_bytes + (row - channel * G::height) * 16;
            put_words<T, G>(to, words, read_only(skips + channel));
        }
        return;
    }
    constexpr int kLines = G::height * G::width / (2 * kLine<G>);
    QUARTERMAP_NO_UNROLL
    for (int channel = warp; channel < kChannels * G::kGroups; channel += G::all_warps)
    {
        float const skip = read_only(skips + channel);
        QUARTERMAP_UNROLL
        for (int n = 0; n < kLines; n += 32)
        {
            if (n + 32 <= kLines || n + lane < kLines)
            {
                Word words[kLine<G>];
                load_words(x + channel * (G::height * G::width) + (n + lane) * (2 * kLine<G>), words);
                put_words<T, G>(base + channel * G::map_bytes + (n + lane) * (4 * kLine<G>), words, skip);
            }
        }
    }
}

// Rows of 7 are packed where x was, and leave as whole lines.
template <typename T, class G>
QUARTERMAP_DEVICE void store_rows_of_7(T* y, Shared base)
{
    for (int row = thread_index(); row < kChannels * G::kGroups * G::height; row += G::threads)
    {
        int const channel = row / G::height;
        Word words[4];
        read_shared(base + G::all_maps_bytes + channel * G::map_bytes + (row - channel * G::height) * 16, words);
        QUARTERMAP_UNROLL
        for (int n = 0; n < 7; ++n)
        {
            write_shared_half(base + row * 14 + 2 * n, (n & 1) != 0 ? words[n / 2] >> 16 : words[n / 2]);
        }
    }
    wait_for_block<Barrier::kRowsPacked>();
    for (int i = thread_index(); i < kChannels * G::kGroups * G::height * G::width / 8; i += G::threads)
    {
        Word words[4];
        read_shared(base + i * 16, words);
        store_words(y + i * 8, words);
    }
}

template <typename T, class G>
QUARTERMAP_DEVICE void store_maps(T* y, Shared base, int warp, int lane)
{
    if constexpr (G::pitch != G::width)
    {
        store_rows_of_7<T, G>(y, base);
        return;
    }
    constexpr int kLines = G::height * G::width / (2 * kLine<G>);
    QUARTERMAP_NO_UNROLL
    for (int channel = warp; channel < kChannels * G::kGroups; channel += G::all_warps)
    {
        Shared const from = base + G::all_maps_bytes + channel * G::map_bytes;
        QUARTERMAP_UNROLL
        for (int n = 0; n < kLines; n += 32)
        {
            if (n + 32 <= kLines || n + lane < kLines)
            {
                Word words[kLine<G>];
                read_shared(from + (n + lane) * (4 * kLine<G>), words);
                store_words(y + channel * (G::height * G::width) + (n + lane) * (2 * kLine<G>), words);
            }
        }
    }
}

} // namespace tensor_core
} // namespace quartermap
