// From a plan to the instance of the kernel that carries it out.
#pragma once

#include "selective_scan_kernel.h"

namespace quartermap
{

namespace instances
{

template <typename T, int kChannels, bool kOneState, bool kResident>
Kernel ranked(QuartermapScan const& scan)
{
    return scan.dt_rank > 0 ? &selective_scan_kernel<T, kChannels, kOneState, true, kResident>
                            : &selective_scan_kernel<T, kChannels, kOneState, false, kResident>;
}

template <typename T, bool kOneState>
Kernel stated(QuartermapScan const& scan, LaunchPlan const& plan)
{
    if (!plan.resident)
    {
        return ranked<T, 1, kOneState, false>(scan);
    }
    if constexpr (kOneState)
    {
        if (plan.channels_per_thread == 4)
        {
            return ranked<T, 4, kOneState, true>(scan);
        }
    }
    return plan.channels_per_thread == 2 ? ranked<T, 2, kOneState, true>(scan)
                                         : ranked<T, 1, kOneState, true>(scan);
}

} // namespace instances

template <typename T>
Kernel kernel_of(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return scan.d_state == 1 ? instances::stated<T, true>(scan, plan) : instances::stated<T, false>(scan, plan);
}

} // namespace quartermap
