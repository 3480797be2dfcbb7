// What computes the scans of a node, where a provider keeps its memory: on the CPU, or on a CUDA device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "interface.h"
#include "quartermap/cpu_scan.h"
#include "shapes.h"

namespace quartermap::onnxruntime
{

// One run of a node: what it was given, of sizes that fit each other.
struct ScanRun
{
    Api const& api;
    KernelContext* context;
    bool of_maps;         // SelectiveScan2D, or else SelectiveScan
    int element_type;     // of the maps: a TensorType
    std::int32_t threads; // of the session; 0 if nobody said
    QuartermapCpuScan const& scan; // its sizes, directions and softplus
    std::vector<Input> const& inputs;
    void* y;
};

// One for each node. Its session may run it from several threads at once.
class ScanRunner
{
public:
    virtual ~ScanRunner() = default;
    // Throws a Refusal, or what ONNX Runtime returned.
    virtual void run(ScanRun const& run) = 0;
};

// The runners of a provider.
struct ScanProvider
{
    char const* name; // as ONNX Runtime spells it; null is the CPU
    std::unique_ptr<ScanRunner> (*make_runner)();
};

} // namespace quartermap::onnxruntime
