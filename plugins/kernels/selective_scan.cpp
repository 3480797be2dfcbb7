// The C interface: checks what it is given, makes plans, and hands them to the kernel of the element type.
#include "quartermap/selective_scan.h"

#include <cstdlib>
#include <cstring>
#include <limits>

#include "plan_choice.h"
#include "runtime.h"

namespace
{

using quartermap::DeviceLimits;
using quartermap::KernelArguments;
using quartermap::KernelSequence;
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

// The kind of kernels that the environment asks for; false if it asks for one that there is not.
bool wanted_kind(int& kind)
{
    kind = quartermap::tensor_core::kAnyKind;
    char const* const wanted = std::getenv("QUARTERMAP_KERNELS");
    if (wanted == nullptr || *wanted == '\0')
    {
        return true;
    }
    char const* const names[] = {"general", "resident", "split", "streamed"}; // QuartermapKernels
    for (int i = 0; i < 4; ++i)
    {
        kind = std::strcmp(wanted, names[i]) == 0 ? i : kind;
    }
    return kind != quartermap::tensor_core::kAnyKind;
}

std::int32_t plan_for(QuartermapScan const& scan, DeviceLimits const& limits, QuartermapScanPlan& plan)
{
    LaunchPlan layout{};
    int kind = 0;
    if (!wanted_kind(kind))
    {
        return QUARTERMAP_BAD_KIND;
    }
    if (!quartermap::choose_plan(scan, limits, kind, layout))
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
    plan.kernels = layout.kernels;
    plan.workspace_bytes = quartermap::workspace_bytes(scan, layout);
    std::memcpy(plan.layout, &layout, sizeof layout);
    return QUARTERMAP_SUCCESS;
}

LaunchPlan layout_of(QuartermapScanPlan const& plan)
{
    LaunchPlan layout{};
    std::memcpy(&layout, plan.layout, sizeof layout);
    return layout;
}

quartermap::Kernel general_kernel(QuartermapScan const& scan, LaunchPlan const& layout)
{
    switch (scan.element_type)
    {
    case QUARTERMAP_FLOAT32: return quartermap::kernel_float32(scan, layout);
    case QUARTERMAP_FLOAT16: return quartermap::kernel_float16(scan, layout);
    default: return quartermap::kernel_bfloat16(scan, layout);
    }
}

quartermap::Kernel float16_kernel(QuartermapScan const& scan, LaunchPlan const& layout)
{
    if (layout.kernels == QUARTERMAP_RESIDENT)
    {
        return quartermap::resident_float16(layout);
    }
    return scan.d_state > 1 ? quartermap::states_float16(scan, layout) : quartermap::split_float16(scan, layout);
}

quartermap::Kernel bfloat16_kernel(QuartermapScan const& scan, LaunchPlan const& layout)
{
    if (layout.kernels == QUARTERMAP_RESIDENT)
    {
        return quartermap::resident_bfloat16(layout);
    }
    return scan.d_state > 1 ? quartermap::states_bfloat16(scan, layout) : quartermap::split_bfloat16(scan, layout);
}

// Those of tensor_core/: one that prepares the weights, the scan, and one that sums up what was scanned apart.
KernelSequence tensor_core_kernels(QuartermapScan const& scan, LaunchPlan const& layout)
{
    using quartermap::tensor_core::kSmallThreads;
    using quartermap::tensor_core::kSumBytes;
    bool const half = scan.element_type == QUARTERMAP_FLOAT16;
    KernelSequence found{};
    found.launches[found.count++]
        = {quartermap::prepare_kernel_of(scan.element_type), layout.prepare_blocks, kSmallThreads, 0};
    found.launches[found.count++] = {half ? float16_kernel(scan, layout) : bfloat16_kernel(scan, layout), layout.blocks, layout.threads(), layout.shared_bytes};
    if (layout.kernels != QUARTERMAP_SPLIT)
    {
        return found;
    }
    std::int64_t const pairs = scan.batch * scan.d_inner * scan.height * ((scan.width + 1) / 2);
    found.launches[found.count++]
        = {quartermap::sum_kernel_of(scan.element_type), quartermap::ceil_div(pairs, kSmallThreads), kSmallThreads,
            kSumBytes};
    return found;
}

KernelSequence kernels_of(QuartermapScanPlan const& plan)
{
    LaunchPlan const layout = layout_of(plan);
    if (layout.kernels != QUARTERMAP_GENERAL)
    {
        return tensor_core_kernels(plan.scan, layout);
    }
    KernelSequence found{};
    found.launches[found.count++]
        = {general_kernel(plan.scan, layout), layout.blocks, layout.threads(), layout.shared_bytes};
    return found;
}

bool known_element_type(QuartermapScan const& scan)
{
    return scan.element_type >= QUARTERMAP_FLOAT32 && scan.element_type <= QUARTERMAP_BFLOAT16;
}

// Whether all tensors begin where the widest accesses may.
bool aligned(QuartermapScanTensors const& tensors)
{
    void const* const all[] = {tensors.x, tensors.dt, tensors.B, tensors.C, tensors.A, tensors.D, tensors.dt_bias,
        tensors.dt_weight, tensors.y, tensors.workspace};
    for (void const* const each : all)
    {
        if (reinterpret_cast<std::uintptr_t>(each) % 16 != 0)
        {
            return false;
        }
    }
    return true;
}

// Places of the buffers in the workspace.
quartermap::TensorCoreBuffers buffers_in(char* memory, QuartermapScan const& scan, LaunchPlan const& layout)
{
    quartermap::tensor_core::Workspace const at = quartermap::tensor_core::workspace_of(scan, layout);
    quartermap::TensorCoreBuffers found{};
    found.weight = memory + at.weight;
    found.bias = reinterpret_cast<float*>(memory + at.bias);
    found.skip = reinterpret_cast<float*>(memory + at.skip);
    found.told = reinterpret_cast<std::uint32_t*>(memory + at.told);
    found.told_count = static_cast<std::uint32_t>(at.told_count);
    found.maps = reinterpret_cast<float*>(memory + at.maps);
    found.parts = memory + at.parts;
    return found;
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
    case QUARTERMAP_MISALIGNED: return "a tensor or the workspace does not begin at a multiple of 16 bytes";
    case QUARTERMAP_BAD_KIND:
        return "the environment variable QUARTERMAP_KERNELS has to be general, resident, split or streamed, or unset";
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
    return check(scan) == QUARTERMAP_SUCCESS ? quartermap::most_workspace(*scan) : 0;
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
    if (!known_element_type(plan->scan))
    {
        return QUARTERMAP_BAD_ELEMENT_TYPE;
    }
    KernelSequence const kernels = kernels_of(*plan);
    std::int32_t status = QUARTERMAP_SUCCESS;
    for (int i = 0; i < kernels.count && status == QUARTERMAP_SUCCESS; ++i)
    {
        status = quartermap::prepare(kernels.launches[i].kernel);
    }
    return status;
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
    if (!known_element_type(plan->scan))
    {
        return QUARTERMAP_BAD_ELEMENT_TYPE;
    }
    if (!aligned(*tensors))
    {
        return QUARTERMAP_MISALIGNED;
    }
    KernelArguments arguments{};
    arguments.scan = plan->scan;
    arguments.tensors = *tensors;
    arguments.plan = layout_of(*plan);
    bool const in_place = plan->scan.element_type == QUARTERMAP_FLOAT32;
    arguments.sum = static_cast<float*>(in_place ? tensors->y : tensors->workspace);
    if (arguments.plan.kernels != QUARTERMAP_GENERAL)
    {
        arguments.buffers = buffers_in(static_cast<char*>(tensors->workspace), plan->scan, arguments.plan);
    }
    KernelSequence const kernels = kernels_of(*plan);
    std::int32_t status = QUARTERMAP_SUCCESS;
    for (int i = 0; i < kernels.count && status == QUARTERMAP_SUCCESS; ++i)
    {
        status = quartermap::launch(kernels.launches[i], arguments, stream);
    }
    return status;
}
