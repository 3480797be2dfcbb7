// From a row of the table of stages to its kernel.
#pragma once

#include "resident_kernel.h"
#include "stages.h"

namespace quartermap
{
namespace tensor_core
{

template <typename T, class... G>
Kernel const* resident_kernels(StageTable<G...> const&)
{
    static Kernel const kernels[] = {&resident_kernel<T, G>...};
    return kernels;
}

} // namespace tensor_core
} // namespace quartermap
