#include "split_dispatch.h"

quartermap::Kernel quartermap::split_bfloat16(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return tensor_core::split_kernel_of<BFloat16>(scan, plan);
}
