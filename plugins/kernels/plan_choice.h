// The plan for a scan among those of all kernels, and its workspace.
#pragma once

#include "launch_plan.h"
#include "tensor_core/plan.h"

namespace quartermap
{

// By the estimates, or a plan of one kind (QuartermapKernels) where there is one; false if the scan does not fit the
// device at all.
inline bool choose_plan(QuartermapScan const& scan, DeviceLimits const& limits, int kind, LaunchPlan& best)
{
    LaunchPlan other{};
    bool const found = make_plan(scan, limits, best);
    if (kind != QUARTERMAP_GENERAL && tensor_core::make_plan(scan, limits, kind, other)
        && (!found || kind != tensor_core::kAnyKind
            || tensor_core::estimate_cost(scan, limits, other) < estimate(scan, limits, best)))
    {
        best = other;
        return true;
    }
    return found;
}

// Of a float32 sum for each value of x, in global memory.
inline std::uint64_t sum_bytes(QuartermapScan const& scan)
{
    return static_cast<std::uint64_t>(scan.batch) * static_cast<std::uint64_t>(scan.d_inner)
        * static_cast<std::uint64_t>(scan.height * scan.width) * sizeof(float);
}

inline std::uint64_t workspace_bytes(QuartermapScan const& scan, LaunchPlan const& plan)
{
    if (plan.kernels != QUARTERMAP_GENERAL)
    {
        return static_cast<std::uint64_t>(tensor_core::workspace_of(scan, plan).bytes);
    }
    // float32 maps are summed up in y itself.
    return plan.resident || scan.element_type == QUARTERMAP_FLOAT32 ? 0 : sum_bytes(scan);
}

// At least what any plan for the scan, or for one with a smaller batch, height or width, needs on any device.
inline std::uint64_t most_workspace(QuartermapScan const& scan)
{
    bool const none = scan.element_type == QUARTERMAP_FLOAT32 || !may_need_workspace(scan);
    std::uint64_t const general = none ? 0 : sum_bytes(scan);
    return std::max(general, static_cast<std::uint64_t>(tensor_core::most_workspace(scan)));
}

} // namespace quartermap
