#include "resident_dispatch.h"

quartermap::Kernel quartermap::resident_float16(LaunchPlan const& plan)
{
    return tensor_core::resident_kernels<Float16>(tensor_core::Stages())[plan.stage];
}
