// A golden case with its tensors where the kernel can reach them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "capabilities.h"
#include "device_memory.h"
#include "golden_case.h"
#include "interface.h"

namespace quartermap::host
{

class Scene
{
public:
    explicit Scene(Case const& golden);

    // As the builder does; the plugin then says how much workspace it wants.
    bool configure(Capabilities const& plugin);
    bool tell(Capabilities const& plugin) const;
    bool enqueue(Capabilities const& plugin);

    // Runs what onShapeChange was told of, and compares. Returns the error as a share of the largest value; infinite if
    // the run failed.
    double run(Capabilities const& plugin);
    bool close(Capabilities const& plugin);

private:
    std::int32_t count() const;

    Case const& golden_;
    nvinfer1::DataType type_;
    Memory y_;
    std::unique_ptr<Memory> workspace_;
    std::vector<nvinfer1::DynamicPluginTensorDesc> descs_;
    std::vector<nvinfer1::PluginTensorDesc> plain_;
    std::vector<Memory> memory_;
    std::vector<void const*> inputs_;
    bool fine_ = true;
};

} // namespace quartermap::host
