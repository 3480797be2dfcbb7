#include "split_dispatch.h"

quartermap::Kernel quartermap::split_float16(LaunchPlan const& plan)
{
    return plan.stage == 8 ? tensor_core::split_kernel_of<Float16, 8>(plan) : tensor_core::split_kernel_of<Float16, 7>(plan);
}
