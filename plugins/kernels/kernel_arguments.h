// What a launch hands to the kernel, and the kernels of each element type.
#pragma once

#include "launch_plan.h"
#include "quartermap/selective_scan.h"

namespace quartermap
{

struct KernelArguments
{
    QuartermapScan scan;
    QuartermapScanTensors tensors;
    LaunchPlan plan;
    float* sum; // (batch, d_inner, H, W), when the maps are not resident
};

using Kernel = void (*)(KernelArguments);

// The instance that carries out a plan. One translation unit each.
Kernel kernel_float32(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel kernel_float16(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel kernel_bfloat16(QuartermapScan const& scan, LaunchPlan const& plan);

} // namespace quartermap
