#include "split_dispatch.h"

quartermap::Kernel quartermap::split_bfloat16(LaunchPlan const& plan)
{
    return plan.stage == 8 ? tensor_core::split_kernel_of<BFloat16, 8>(plan) : tensor_core::split_kernel_of<BFloat16, 7>(plan);
}
