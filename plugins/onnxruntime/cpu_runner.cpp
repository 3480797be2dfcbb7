#include "cpu_runner.h"

#include "session_pool.h"

namespace quartermap::onnxruntime
{
namespace
{

std::int32_t kernel_type(int element_type)
{
    switch (element_type)
    {
    case FLOAT16: return QUARTERMAP_CPU_FLOAT16;
    case BFLOAT16: return QUARTERMAP_CPU_BFLOAT16;
    case FLOAT64: return QUARTERMAP_CPU_FLOAT64;
    default: return QUARTERMAP_CPU_FLOAT32;
    }
}

QuartermapCpuTensors tensors_of(ScanRun const& run)
{
    auto const at = [&](std::size_t i) { return run.inputs[i].data; };
    auto const floats = [&](std::size_t i) { return static_cast<float const*>(run.inputs[i].data); };
    if (run.of_maps)
    {
        return {at(0), at(1), at(2), at(3), floats(4), floats(5), floats(6), at(7), run.y};
    }
    return {at(0), at(1), at(3), at(4), floats(2), floats(5), floats(6), nullptr, run.y};
}

class CpuRunner : public ScanRunner
{
public:
    void run(ScanRun const& run) override
    {
        QuartermapCpuScan scan = run.scan;
        scan.element_type = kernel_type(run.element_type);
        scan.threads = run.threads;
        QuartermapCpuTensors const tensors = tensors_of(run);
        Pool pool{&run.api, run.context, nullptr};
        check_call(pool, quartermap_cpu_scan(&scan, &tensors, run_in_pool, &pool));
    }
};

} // namespace

ScanProvider cpu_provider()
{
    return {nullptr, []() -> std::unique_ptr<ScanRunner> { return std::make_unique<CpuRunner>(); }};
}

} // namespace quartermap::onnxruntime
