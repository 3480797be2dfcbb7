// The C interface: checks what it is given, makes plans, and hands them to the kernel of the element type.
#include "quartermap/selective_scan.h"

#include <cstring>
#include <limits>

#include "runtime.h"

namespace
{

using quartermap::DeviceLimits;
using quartermap::LaunchPlan;

static_assert(sizeof(LaunchPlan) <= sizeof(QuartermapScanPlan::layout), "the layout has to fit the public structure");

// Every index within one map, and the end of a chunk behind it, fits 32 bits.
constexpr std::int64_t kMostPositions = std::int64_t{1} << 30;
constexpr std::int64_t kMostChannels = std::int64_t{1} << 24;
constexpr std::int64_t kMostStates = 256;
constexpr std::int64_t kMostRank = 1024;
constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();

std::int32_t check(QuartermapScan const* scan)
{
    if (scan == nullptr)
    {
        return QUARTERMAP_NULL_POINTER;
    }
    if (scan->element_type < QUARTERMAP_FLOAT32 || scan->element_type > QUARTERMAP_BFLOAT16)
    {
        return QUARTERMAP_BAD_ELEMENT_TYPE;
    }
    if (scan->direction_count < 1 || scan->direction_count > QUARTERMAP_MAX_DIRECTIONS)
    {
        return QUARTERMAP_BAD_DIRECTION;
    }
    for (int k = 0; k < scan->direction_count; ++k)
    {
        if (scan->directions[k] < QUARTERMAP_ROW || scan->directions[k] > QUARTERMAP_COLUMN_REVERSE)
        {
            return QUARTERMAP_BAD_DIRECTION;
        }
    }
    if (scan->batch < 1 || scan->d_inner < 1 || scan->height < 1 || scan->width < 1 || scan->d_state < 1
        || scan->dt_rank < 0)
    {
        return QUARTERMAP_BAD_SIZE;
    }
    // By quotients, as products might overflow.
    bool const fits = scan->height <= kMostPositions && scan->width <= kMostPositions / scan->height
        && scan->d_inner <= kMostChannels && scan->d_state <= kMostStates && scan->dt_rank <= kMostRank
        && scan->batch <= kMostBlocks / scan->d_inner;
    return fits ? QUARTERMAP_SUCCESS : QUARTERMAP_TOO_LARGE;
}

std::uint64_t map_bytes(QuartermapScan const& scan)
{
    return static_cast<std::uint64_t>(scan.batch) * static_cast<std::uint64_t>(scan.d_inner)
        * static_cast<std::uint64_t>(scan.height * scan.width) * sizeof(float);
}

std::int32_t plan_for(QuartermapScan const& scan, DeviceLimits const& limits, QuartermapScanPlan& plan)
{
    LaunchPlan layout{};
    if (!quartermap::make_plan(scan, limits, layout))
    {
        return QUARTERMAP_SHARED_MEMORY_TOO_SMALL;
    }
    std::memset(&plan, 0, sizeof plan);
    plan.scan = scan;
    plan.blocks = layout.blocks;
    plan.threads = layout.threads();
    plan.channels = layout.channels();
    plan.chunk = layout.chunk;
    plan.shared_bytes = layout.shared_bytes;
    plan.resident = layout.resident ? 1 : 0;
    // float32 maps are summed up in y itself.
    bool const none = layout.resident || scan.element_type == QUARTERMAP_FLOAT32;
    plan.workspace_bytes = none ? 0 : map_bytes(scan);
    std::memcpy(plan.layout, &layout, sizeof layout);
    return QUARTERMAP_SUCCESS;
}

LaunchPlan layout_of(QuartermapScanPlan const& plan)
{
    LaunchPlan layout{};
    std::memcpy(&layout, plan.layout, sizeof layout);
    return layout;
}

// NULL for an unknown element type.
quartermap::Kernel kernel_of(QuartermapScanPlan const& plan)
{
    LaunchPlan const layout = layout_of(plan);
    switch (plan.scan.element_type)
    {
    case QUARTERMAP_FLOAT32: return quartermap::kernel_float32(plan.scan, layout);
    case QUARTERMAP_FLOAT16: return quartermap::kernel_float16(plan.scan, layout);
    case QUARTERMAP_BFLOAT16: return quartermap::kernel_bfloat16(plan.scan, layout);
    default: return nullptr;
    }
}

} // namespace

extern "C" std::uint32_t quartermap_selective_scan_version(void)
{
    return QUARTERMAP_SELECTIVE_SCAN_VERSION;
}

extern "C" char const* quartermap_selective_scan_message(std::int32_t status)
{
    switch (status)
    {
    case QUARTERMAP_SUCCESS: return "success";
    case QUARTERMAP_BAD_SIZE: return "a size is not positive (only dt_rank may be 0)";
    case QUARTERMAP_BAD_DIRECTION:
        return "there have to be 1 to 8 directions, each 0 (row), 1 (column), 2 (row_reverse) or 3 (column_reverse)";
    case QUARTERMAP_BAD_ELEMENT_TYPE: return "the element type has to be 0 (float32), 1 (float16) or 2 (bfloat16)";
    case QUARTERMAP_TOO_LARGE:
        return "a size is too large: at most 2^30 positions, 2^24 channels, 256 states, rank 1024 and 2^31 - 1 maps";
    case QUARTERMAP_NULL_POINTER: return "a tensor is missing (a null pointer)";
    case QUARTERMAP_WORKSPACE_TOO_SMALL: return "the workspace is missing or smaller than the plan asks for";
    case QUARTERMAP_SHARED_MEMORY_TOO_SMALL: return "the device has too little shared memory for this scan";
    case QUARTERMAP_NO_KERNEL_IMAGE:
        return "the library holds no code for this GPU; build it for the GPU's compute capability, which has to be 8.0 or "
               "newer, such as: quartermap plugin build --cuda-architectures 86";
    default: break;
    }
    return status >= QUARTERMAP_CUDA_ERROR ? quartermap::runtime_message(status - QUARTERMAP_CUDA_ERROR)
                                           : "unknown status";
}

extern "C" std::int32_t quartermap_selective_scan_validate(QuartermapScan const* scan)
{
    return check(scan);
}

extern "C" std::uint64_t quartermap_selective_scan_workspace(QuartermapScan const* scan)
{
    bool const none = check(scan) != QUARTERMAP_SUCCESS || scan->element_type == QUARTERMAP_FLOAT32
        || !quartermap::may_need_workspace(*scan);
    return none ? 0 : map_bytes(*scan);
}

extern "C" std::int32_t quartermap_selective_scan_plan(QuartermapScan const* scan, QuartermapScanPlan* plan)
{
    DeviceLimits limits{};
    std::int32_t status = plan == nullptr ? QUARTERMAP_NULL_POINTER : check(scan);
    if (status == QUARTERMAP_SUCCESS)
    {
        status = quartermap::device_limits(limits);
    }
    return status == QUARTERMAP_SUCCESS ? plan_for(*scan, limits, *plan) : status;
}

extern "C" std::int32_t quartermap_selective_scan_plan_for(QuartermapScan const* scan, std::int32_t multiprocessors,
    std::int64_t shared_per_block, std::int64_t shared_per_multiprocessor, QuartermapScanPlan* plan)
{
    if (plan == nullptr)
    {
        return QUARTERMAP_NULL_POINTER;
    }
    std::int32_t const status = check(scan);
    if (status != QUARTERMAP_SUCCESS)
    {
        return status;
    }
    if (multiprocessors < 1)
    {
        return QUARTERMAP_BAD_SIZE;
    }
    return plan_for(*scan, {multiprocessors, shared_per_block, shared_per_multiprocessor}, *plan);
}

extern "C" std::int32_t quartermap_selective_scan_prepare(QuartermapScanPlan const* plan)
{
    if (plan == nullptr)
    {
        return QUARTERMAP_NULL_POINTER;
    }
    quartermap::Kernel const kernel = kernel_of(*plan);
    return kernel == nullptr ? QUARTERMAP_BAD_ELEMENT_TYPE : quartermap::prepare(kernel);
}

extern "C" std::int32_t quartermap_selective_scan_launch(
    QuartermapScanPlan const* plan, QuartermapScanTensors const* tensors, void* stream)
{
    if (plan == nullptr || tensors == nullptr || tensors->x == nullptr || tensors->dt == nullptr
        || tensors->B == nullptr || tensors->C == nullptr || tensors->A == nullptr || tensors->D == nullptr
        || tensors->dt_bias == nullptr || tensors->y == nullptr
        || (plan->scan.dt_rank > 0 && tensors->dt_weight == nullptr))
    {
        return QUARTERMAP_NULL_POINTER;
    }
    if (plan->workspace_bytes > 0
        && (tensors->workspace == nullptr || tensors->workspace_bytes < plan->workspace_bytes))
    {
        return QUARTERMAP_WORKSPACE_TOO_SMALL;
    }
    quartermap::Kernel const kernel = kernel_of(*plan);
    if (kernel == nullptr)
    {
        return QUARTERMAP_BAD_ELEMENT_TYPE;
    }
    quartermap::KernelArguments arguments{};
    arguments.scan = plan->scan;
    arguments.tensors = *tensors;
    arguments.plan = layout_of(*plan);
    bool const in_place = plan->scan.element_type == QUARTERMAP_FLOAT32;
    arguments.sum = static_cast<float*>(in_place ? tensors->y : tensors->workspace);
    return quartermap::launch(kernel, arguments, stream);
}
