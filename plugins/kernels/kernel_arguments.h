// What a launch hands to its kernels, and the kernels of each element type.
#pragma once

#include "launch_plan.h"
#include "quartermap/selective_scan.h"

namespace quartermap
{

// Of the kernels in tensor_core/, in the workspace.
struct TensorCoreBuffers
{
    void* weight; // the first three: tensor_core/prepare_kernel.h
    float* bias;
    float* skip;
    float* maps; // of chunks, and who has told them: tensor_core/walk.h
    std::uint32_t* told;
    std::uint32_t told_count;
    void* parts; // (K, batch, d_inner, H, W, or W + 1 where W is odd)
};

struct KernelArguments
{
    QuartermapScan scan;
    QuartermapScanTensors tensors;
    LaunchPlan plan;
    float* sum; // (batch, d_inner, H, W), when the maps are not resident
    TensorCoreBuffers buffers;
};

using Kernel = void (*)(KernelArguments);

// A kernel and how it is launched.
struct KernelLaunch
{
    Kernel kernel;
    std::int64_t blocks;
    int threads;
    int shared_bytes;
};

// What carries a plan out, one launch after the other.
struct KernelSequence
{
    KernelLaunch launches[3];
    int count;
};

// The instances that carry out a plan. One translation unit each.
Kernel kernel_float32(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel kernel_float16(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel kernel_bfloat16(QuartermapScan const& scan, LaunchPlan const& plan);

// Those in tensor_core/.
Kernel resident_float16(LaunchPlan const& plan);
Kernel resident_bfloat16(LaunchPlan const& plan);
Kernel split_float16(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel split_bfloat16(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel states_float16(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel states_bfloat16(QuartermapScan const& scan, LaunchPlan const& plan);
Kernel prepare_kernel_of(int element_type);
Kernel sum_kernel_of(int element_type);

} // namespace quartermap
