// From a plan to the instance of the split kernel that carries it out.
#pragma once

#include "split_kernels.h"

namespace quartermap
{
namespace tensor_core
{

template <typename T, int kTiles>
Kernel split_kernel_of(LaunchPlan const& plan)
{
    switch (plan.rank_blocks)
    {
    case 1: return &split_kernel<T, 1, kTiles>;
    case 2: return &split_kernel<T, 2, kTiles>;
    case 4: return &split_kernel<T, 4, kTiles>;
    default: return &split_kernel<T, 8, kTiles>;
    }
}

} // namespace tensor_core
} // namespace quartermap
