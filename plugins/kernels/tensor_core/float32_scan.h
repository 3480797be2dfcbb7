// One channel in float32 by a warp, from the tensors as they are: slow, and right for all values.
//
// The kernels of this folder round steps, drives, states and sums to 16 bits, and a value may pass the range of float16
// where y does not. Then y shows it: an overflow is an infinity, an infinity in a product of matrices meets zeros and
// gives NaN, and a state that is NaN stays so to the end of its direction. What a block has to do with a y that is not
// finite it therefore does again, here.
#pragma once

#include "../recurrence.h"
#include "../scan_order.h"
#include "source.h"

namespace quartermap
{
namespace tensor_core
{

// Positions of one map, in raster order.
struct Stretch
{
    std::int64_t image;
    int channel;
    int first;
    int count;
};

// Where the n-th position of a direction lies.
QUARTERMAP_DEVICE int position_of(int n, int direction, int height, int width)
{
    int const q = is_reverse(direction) ? height * width - 1 - n : n;
    return is_column(direction) ? q % height * width + q / height : q;
}

// Adds what the `index`-th state of direction `k` gives at the positions of a stretch to their sums, 32 positions of the direction at a time.
template <typename T>
QUARTERMAP_DEVICE void add_in_float32(
    KernelArguments const& arguments, Stretch const& stretch, int k, int index, Shared sums, int lane)
{
    QuartermapScan const& scan = arguments.scan;
    int const height = static_cast<int>(scan.height);
    int const width = static_cast<int>(scan.width);
    int const length = height * width;
    int const ranks = static_cast<int>(scan.dt_rank);
    std::int64_t const row = k * scan.d_inner + stretch.channel;
    std::int64_t const map = (stretch.image * scan.direction_count + k) * length;
    T const* const x
        = static_cast<T const*>(arguments.tensors.x) + (stretch.image * scan.d_inner + stretch.channel) * length;
    T const* const weight = static_cast<T const*>(arguments.tensors.dt_weight) + row * ranks;
    T const* const dt = static_cast<T const*>(arguments.tensors.dt) + map * ranks;
    std::int64_t const weights = map * scan.d_state + static_cast<std::int64_t>(index) * length;
    float const bias = read_only(arguments.tensors.dt_bias + row);
    float const exponent = kLog2E * read_only(arguments.tensors.A + row * scan.d_state + index);
    float state = 0.0F;
    QUARTERMAP_NO_UNROLL
    for (int first = 0; first < length; first += 32)
    {
        bool const live = first + lane < length;
        int const at = position_of(live ? first + lane : 0, scan.directions[k], height, width);
        float step = bias;
        QUARTERMAP_NO_UNROLL
        for (int r = 0; r < ranks; ++r)
        {
            T const value = read_only(dt + static_cast<std::int64_t>(r) * length + at);
            step += to_float(read_only(weight + r)) * to_float(value);
        }
        step = softplus(step);
        float const b = to_float(read_only(static_cast<T const*>(arguments.tensors.B) + weights + at));
        float const c = to_float(read_only(static_cast<T const*>(arguments.tensors.C) + weights + at));
        Affine own = {power_of_two(step * exponent), step * to_float(read_only(x + at)) * b};
        own = live ? own : Affine{1.0F, 0.0F};
        QUARTERMAP_NO_UNROLL
        for (int distance = 1; distance < 32; distance *= 2)
        {
            Affine const earlier = {from_earlier_lane(own.a, distance, 32), from_earlier_lane(own.b, distance, 32)};
            own = lane >= distance ? compose(earlier, own) : own;
        }
        state = own.a * state + own.b;
        int const place = at - stretch.first;
        if (live && place >= 0 && place < stretch.count)
        {
            write_shared(sums + 4 * place, read_shared_float(sums + 4 * place) + c * state);
        }
        state = from_lane(state, 31, 32);
    }
}

// y at a stretch, whose sums take `count` floats of shared memory. For a whole warp.
template <typename T>
QUARTERMAP_DEVICE void compute_in_float32(
    KernelArguments const& arguments, Stretch const& stretch, Shared sums, int lane)
{
    QUARTERMAP_NO_UNROLL
    for (int i = lane; i < stretch.count; i += 32)
    {
        write_shared(sums + 4 * i, 0.0F);
    }
    QUARTERMAP_NO_UNROLL
    for (int k = 0; k < arguments.scan.direction_count; ++k)
    {
        QUARTERMAP_NO_UNROLL
        for (int index = 0; index < arguments.scan.d_state; ++index)
        {
            wait_for_warp<Barrier::kSumsKept>();
            add_in_float32<T>(arguments, stretch, k, index, sums, lane);
        }
    }
    wait_for_warp<Barrier::kSumsKept>();
    std::int64_t const map = stretch.image * arguments.scan.d_inner + stretch.channel;
    std::int64_t const at = map * arguments.scan.height * arguments.scan.width + stretch.first;
    float const skip = read_only(arguments.buffers.skip + stretch.channel);
    QUARTERMAP_NO_UNROLL
    for (int i = lane; i < stretch.count; i += 32)
    {
        float const x = to_float(read_only(static_cast<T const*>(arguments.tensors.x) + at + i));
        store(skip * x + read_shared_float(sums + 4 * i), static_cast<T*>(arguments.tensors.y)[at + i]);
    }
    wait_for_warp<Barrier::kSumsKept>();
}

} // namespace tensor_core
} // namespace quartermap
