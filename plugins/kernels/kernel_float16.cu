#include "kernel_dispatch.h"

quartermap::Kernel quartermap::kernel_float16(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return kernel_of<Float16>(scan, plan);
}
