// From a plan to the instance of the kernel that carries it out.
#pragma once

#include "selective_scan_kernel.h"

namespace quartermap
{

namespace instances
{

template <typename T, int kChannels, bool kOneState, bool kLowRank, bool kResident>
int start(KernelArguments const& arguments, void* stream)
{
    LaunchPlan const& plan = arguments.plan;
    auto const blocks = static_cast<unsigned>(plan.blocks);
    auto const threads = static_cast<unsigned>(plan.threads());
#if defined(__CUDACC__)
    auto const kernel = &selective_scan_kernel<T, kChannels, kOneState, kLowRank, kResident>;
    if (plan.shared_bytes > 48 * 1024)
    {
        cudaError_t const error
            = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
        if (error != cudaSuccess)
        {
            return static_cast<int>(error);
        }
    }
    auto const size = static_cast<std::size_t>(plan.shared_bytes);
    kernel<<<blocks, threads, size, static_cast<cudaStream_t>(stream)>>>(arguments);
    // Not cudaGetLastError: an error of somebody else is left for them to find.
    return static_cast<int>(cudaPeekAtLastError());
#else
    static_cast<void>(stream);
    auto const body = [](void const* a) {
        selective_scan_kernel<T, kChannels, kOneState, kLowRank, kResident>(*static_cast<KernelArguments const*>(a));
    };
    return emulation::run(body, &arguments, blocks, static_cast<int>(threads), plan.shared_bytes) ? 0 : 719;
#endif
}

template <typename T, int kChannels, bool kOneState, bool kResident>
int start_ranked(KernelArguments const& arguments, void* stream)
{
    return arguments.scan.dt_rank > 0 ? start<T, kChannels, kOneState, true, kResident>(arguments, stream)
                                      : start<T, kChannels, kOneState, false, kResident>(arguments, stream);
}

template <typename T, bool kOneState>
int start_stated(KernelArguments const& arguments, void* stream)
{
    LaunchPlan const& plan = arguments.plan;
    if (!plan.resident)
    {
        return start_ranked<T, 1, kOneState, false>(arguments, stream);
    }
    if constexpr (kOneState)
    {
        if (plan.channels_per_thread == 4)
        {
            return start_ranked<T, 4, kOneState, true>(arguments, stream);
        }
    }
    if (plan.channels_per_thread == 2)
    {
        return start_ranked<T, 2, kOneState, true>(arguments, stream);
    }
    return start_ranked<T, 1, kOneState, true>(arguments, stream);
}

} // namespace instances

template <typename T>
int dispatch(KernelArguments const& arguments, void* stream)
{
    return arguments.scan.d_state == 1 ? instances::start_stated<T, true>(arguments, stream)
                                       : instances::start_stated<T, false>(arguments, stream);
}

} // namespace quartermap
