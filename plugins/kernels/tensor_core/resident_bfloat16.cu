#include "resident_dispatch.h"

quartermap::Kernel quartermap::resident_bfloat16(LaunchPlan const& plan)
{
    return tensor_core::resident_kernels<BFloat16>(tensor_core::Stages())[plan.stage];
}
