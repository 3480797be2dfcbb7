// Before the other kernels of a launch: their weights, biases and skip weights, from the tensors.
//
//   weight   (K x d_inner, 8 x rank_blocks)   T         for float16 times log2 e; spare ranks are zero, but for the
//                                                       resident kernel the last two, if there are two, hold the bias
//                                                       and what is left of it after rounding
//   bias     (K x d_inner)                    float32   for float16 times log2 e
//   skip     (d_inner)                        float32   D, added up over the directions
//   told     none told yet
//
// The weights are tensors of the graph like any other: TensorRT tells no moment at which they are fixed (an engine can
// be refitted in place), and PyTorch none at which they have changed. So this is done in every launch.
#pragma once

#include "plan.h"
#include "time_step.h"

namespace quartermap
{
namespace tensor_core
{

template <typename T>
QUARTERMAP_DEVICE T prepared_weight(KernelArguments const& arguments, int row, int rank, float scale)
{
    int const ranks = static_cast<int>(arguments.scan.dt_rank);
    int const padded = 8 * arguments.plan.rank_blocks;
    float value = 0.0F;
    if (rank < ranks)
    {
        T const* const weight = static_cast<T const*>(arguments.tensors.dt_weight);
        value = scale * to_float(read_only(weight + static_cast<std::int64_t>(row) * ranks + rank));
    }
    else if (arguments.plan.kernels == QUARTERMAP_RESIDENT && ranks + 2 <= padded && rank >= padded - 2)
    {
        value = scale * read_only(arguments.tensors.dt_bias + row);
        if (rank == padded - 1)
        {
            T rounded;
            store(value, rounded);
            value -= to_float(rounded);
        }
    }
    // A weight that is too large in powers of two spoils the result, which is then computed in float32 from the tensors:
    // an infinity might meet a rank so small that softplus makes a zero of their product.
    T result;
    store(value, result);
    store(to_float(result) + 0.0F * to_float(result), result);
    return result;
}

template <typename T>
QUARTERMAP_KERNEL(kSmallThreads, 1)
void prepare_kernel(KernelArguments const arguments)
{
    auto const padded = static_cast<unsigned>(8 * arguments.plan.rank_blocks);
    auto const channels = static_cast<unsigned>(arguments.scan.d_inner);
    auto const count = static_cast<unsigned>(arguments.scan.direction_count);
    float const scale = kIsFloat16<T> ? kLog2OfE : 1.0F;
    unsigned const own = block_index() * kSmallThreads + static_cast<unsigned>(thread_index());
    unsigned const all = kSmallThreads * static_cast<unsigned>(arguments.plan.prepare_blocks);
    for (unsigned i = own; i < count * channels * padded; i += all)
    {
        static_cast<T*>(arguments.buffers.weight)[i]
            = prepared_weight<T>(arguments, static_cast<int>(i / padded), static_cast<int>(i % padded), scale);
    }
    for (unsigned i = own; i < count * channels; i += all)
    {
        arguments.buffers.bias[i] = scale * read_only(arguments.tensors.dt_bias + i);
    }
    for (unsigned c = own; c < channels; c += all)
    {
        float sum = 0.0F;
        for (unsigned k = 0; k < count; ++k)
        {
            sum += read_only(arguments.tensors.D + k * channels + c);
        }
        arguments.buffers.skip[c] = sum;
    }
    for (unsigned i = own; i < arguments.buffers.told_count; i += all)
    {
        arguments.buffers.told[i] = 0u;
    }
}

} // namespace tensor_core
} // namespace quartermap
