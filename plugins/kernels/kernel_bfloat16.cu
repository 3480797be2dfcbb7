#include "kernel_dispatch.h"

quartermap::Kernel quartermap::kernel_bfloat16(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return kernel_of<BFloat16>(scan, plan);
}
