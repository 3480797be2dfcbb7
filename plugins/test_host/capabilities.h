// A plugin with its capabilities, as TensorRT holds it.
#pragma once

#include <memory>

#include "interface.h"

namespace quartermap::host
{

struct Capabilities
{
    std::unique_ptr<nvinfer1::IPluginV3> plugin;
    nvinfer1::IPluginV3OneCore* core = nullptr;
    nvinfer1::IPluginV3OneBuild* build = nullptr;
    nvinfer1::IPluginV3OneRuntime* runtime = nullptr;

    explicit Capabilities(nvinfer1::IPluginV3* made)
        : plugin(made)
    {
        if (made != nullptr)
        {
            using Type = nvinfer1::PluginCapabilityType;
            core = static_cast<nvinfer1::IPluginV3OneCore*>(made->getCapabilityInterface(Type::kCORE));
            build = static_cast<nvinfer1::IPluginV3OneBuild*>(made->getCapabilityInterface(Type::kBUILD));
            runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(made->getCapabilityInterface(Type::kRUNTIME));
        }
    }
};

} // namespace quartermap::host
