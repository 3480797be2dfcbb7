#include "prepare_kernel.h"
#include "split_kernels.h"

quartermap::Kernel quartermap::prepare_kernel_of(int element_type)
{
    return element_type == QUARTERMAP_FLOAT16 ? &tensor_core::prepare_kernel<Float16>
                                              : &tensor_core::prepare_kernel<BFloat16>;
}

quartermap::Kernel quartermap::sum_kernel_of(int element_type)
{
    return element_type == QUARTERMAP_FLOAT16 ? &tensor_core::sum_kernel<Float16> : &tensor_core::sum_kernel<BFloat16>;
}
