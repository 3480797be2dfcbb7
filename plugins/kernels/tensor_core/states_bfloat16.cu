#include "split_dispatch.h"

quartermap::Kernel quartermap::states_bfloat16(QuartermapScan const& scan, LaunchPlan const& plan)
{
    return tensor_core::states_kernel_of<BFloat16>(scan, plan);
}
