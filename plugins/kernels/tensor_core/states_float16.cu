#include "split_dispatch.h"

quartermap::Kernel quartermap::states_float16(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return tensor_core::states_kernel_of<Float16>(scan, plan);
}
