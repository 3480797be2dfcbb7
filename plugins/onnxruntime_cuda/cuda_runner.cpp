#include "cuda_runner.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <list>
#include <mutex>
#include <string>

#include "quartermap/selective_scan.h"
#include "status.h"
#include "stream.h"

namespace quartermap::onnxruntime
{
namespace
{

// Plans that a node keeps: one for each size of batch, height and width that it has met, the last ones met.
constexpr std::size_t MOST_PLANS = 32;
// Bytes of a QuartermapScan up to its last field; nothing lies between its fields.
constexpr std::size_t COMPARED = offsetof(QuartermapScan, element_type) + sizeof(QuartermapScan::element_type);

void require_success(std::int32_t status)
{
    if (status != QUARTERMAP_SUCCESS)
    {
        throw Refusal{RUNTIME_EXCEPTION, quartermap_selective_scan_message(status)};
    }
}

std::int32_t kernel_type(int element_type)
{
    switch (element_type)
    {
    case FLOAT16: return QUARTERMAP_FLOAT16;
    case BFLOAT16: return QUARTERMAP_BFLOAT16;
    default: return QUARTERMAP_FLOAT32;
    }
}

// The same directions have the same codes in both interfaces.
static_assert(static_cast<int>(QUARTERMAP_CPU_ROW) == static_cast<int>(QUARTERMAP_ROW), "another code");
static_assert(static_cast<int>(QUARTERMAP_CPU_COLUMN_REVERSE) == static_cast<int>(QUARTERMAP_COLUMN_REVERSE),
    "another code");

QuartermapScan scan_of(ScanRun const& run)
{
    QuartermapScan scan{};
    scan.batch = run.scan.batch;
    scan.d_inner = run.scan.channels;
    scan.height = run.scan.height;
    scan.width = run.scan.width;
    scan.d_state = run.scan.d_state;
    scan.dt_rank = run.scan.dt_rank;
    if (run.scan.direction_count > QUARTERMAP_MAX_DIRECTIONS)
    {
        throw Refusal{NOT_IMPLEMENTED,
            std::to_string(run.scan.direction_count) + " directions; the CUDA kernels take "
                + std::to_string(QUARTERMAP_MAX_DIRECTIONS) + " at most"};
    }
    scan.direction_count = run.scan.direction_count;
    std::copy_n(run.scan.directions, run.scan.direction_count, scan.directions);
    scan.softplus = run.scan.softplus;
    scan.element_type = kernel_type(run.element_type);
    return scan;
}

// Memory that a launch works in, in the order of its stream.
class Workspace
{
public:
    Workspace(std::uint64_t bytes, void* stream)
        : mStream(stream)
    {
        if (bytes > 0)
        {
            require_success(reserve(&mMemory, static_cast<std::size_t>(bytes), stream));
        }
    }
    Workspace(Workspace const&) = delete;
    Workspace& operator=(Workspace const&) = delete;
    ~Workspace()
    {
        if (mMemory != nullptr)
        {
            static_cast<void>(release(mMemory, mStream));
        }
    }
    void* memory() const
    {
        return mMemory;
    }

private:
    void* mStream;
    void* mMemory{nullptr};
};

class CudaRunner : public ScanRunner
{
public:
    void run(ScanRun const& run) override
    {
        if (run.scan.batch == 0)
        {
            return;
        }
        QuartermapScanPlan const plan = plan_for(scan_of(run));
        void* const stream = stream_of(run.api, run.context);
        Workspace const workspace(plan.workspace_bytes, stream);
        auto const at = [&](std::size_t i) { return run.inputs[i].data; };
        auto const floats = [&](std::size_t i) { return static_cast<float const*>(run.inputs[i].data); };
        QuartermapScanTensors const tensors{at(0), at(1), at(2), at(3), floats(4), floats(5), floats(6), at(7), run.y,
            workspace.memory(), plan.workspace_bytes};
        require_success(quartermap_selective_scan_launch(&plan, &tensors, stream));
    }

private:
    // The plan of a scan, prepared on the current device, which is the session's.
    QuartermapScanPlan plan_for(QuartermapScan const& scan)
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        for (auto found = mPlans.begin(); found != mPlans.end(); ++found)
        {
            if (std::memcmp(&found->scan, &scan, COMPARED) == 0)
            {
                mPlans.splice(mPlans.begin(), mPlans, found);
                return *found;
            }
        }
        QuartermapScanPlan plan{};
        require_success(quartermap_selective_scan_plan(&scan, &plan));
        require_success(quartermap_selective_scan_prepare(&plan));
        mPlans.push_front(plan);
        mPlans.resize(std::min(mPlans.size(), MOST_PLANS));
        return plan;
    }

    std::mutex mMutex;
    std::list<QuartermapScanPlan> mPlans;
};

} // namespace

ScanProvider cuda_provider()
{
    return {stream_provider(), []() -> std::unique_ptr<ScanRunner> { return std::make_unique<CudaRunner>(); }};
}

} // namespace quartermap::onnxruntime
