// From a plan to the instance of the split kernel that carries it out.
#pragma once

#include "split_kernels.h"

namespace quartermap
{
namespace tensor_core
{

template <typename T, int kTiles, bool kOdd>
Kernel split_kernel_of(LaunchPlan const& plan)
{
    switch (plan.rank_blocks)
    {
    case 1: return &split_kernel<T, 1, kTiles, kOdd>;
    case 2: return &split_kernel<T, 2, kTiles, kOdd>;
    case 4: return &split_kernel<T, 4, kTiles, kOdd>;
    default: return &split_kernel<T, 8, kTiles, kOdd>;
    }
}

template <typename T>
Kernel states_kernel_of(QuartermapScan const& scan, LaunchPlan const& plan)
{
    if (scan.width % 2 != 0)
    {
        return &states_kernel<T, 7, true>;
    }
    return plan.stage == 8 ? &states_kernel<T, 8, false> : &states_kernel<T, 7, false>;
}

// Maps of odd width come with segments of 7 alone.
template <typename T>
Kernel split_kernel_of(QuartermapScan const& scan, LaunchPlan const& plan)
{
    if (scan.width % 2 != 0)
    {
        return split_kernel_of<T, 7, true>(plan);
    }
    return plan.stage == 8 ? split_kernel_of<T, 8, false>(plan) : split_kernel_of<T, 7, false>(plan);
}

} // namespace tensor_core
} // namespace quartermap
