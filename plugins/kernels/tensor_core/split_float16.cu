#include "split_dispatch.h"

quartermap::Kernel quartermap::split_float16(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return tensor_core::split_kernel_of<Float16>(scan, plan);
}
