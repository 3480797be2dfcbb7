// What a launch hands to the kernel of its element type.
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

// Puts the kernel on the stream (a cudaStream_t). Returns a cudaError_t. One translation unit each.
int launch_float32(KernelArguments const& arguments, void* stream);
int launch_float16(KernelArguments const& arguments, void* stream);
int launch_bfloat16(KernelArguments const& arguments, void* stream);

} // namespace quartermap
