#include "kernel_dispatch.h"

quartermap::Kernel quartermap::kernel_float32(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return kernel_of<float>(scan, plan);
}
