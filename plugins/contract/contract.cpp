#include "contract.h"

#include <cstdio>
#include <string>

#if !defined(QUARTERMAP_EMULATION)
#include <cuda_runtime_api.h>
#endif

namespace
{

std::string quoted(char const* text)
{
    return "\"" + std::string(text) + "\"";
}

std::string write_contract()
{
    std::string directions;
    for (char const* name : quartermap::kDirectionNames)
    {
        directions += (directions.empty() ? "" : ", ") + quoted(name);
    }
    std::string inputs;
    for (quartermap::TensorContract const& input : quartermap::kInputs)
    {
        inputs += std::string(inputs.empty() ? "" : ", ") + "{\"name\": " + quoted(input.name)
            + ", \"type\": " + (input.element_type ? "\"T\"" : "\"float32\"")
            + ", \"optional\": " + (input.optional ? "true" : "false") + "}";
    }
    std::string text = "{\"name\": " + quoted(quartermap::kPluginName)
        + ", \"version\": " + quoted(quartermap::kPluginVersion)
        + ", \"namespace\": " + quoted(quartermap::kPluginNamespace) + ", \"fields\": [{\"name\": "
        + quoted(quartermap::kDirectionsField) + ", \"type\": \"CHAR\"}, {\"name\": "
        + quoted(quartermap::kSoftplusField) + ", \"type\": \"INT32\"}], \"directions\": [" + directions
        + "], \"inputs\": [" + inputs
        + "], \"outputs\": [{\"name\": \"y\", \"type\": \"T\", \"optional\": false}], \"element_types\": [\"float32\", "
          "\"float16\", \"bfloat16\"], \"kernels\": "
        + std::to_string(QUARTERMAP_SELECTIVE_SCAN_VERSION) + ", \"build\": {\"tensorrt\": ";
#if defined(QUARTERMAP_WITH_TENSORRT)
    text += "[\"10\", \"11\", \"rtx\"]"; // major versions, and TensorRT for RTX
#else
    text += "null";
#endif
    text += ", \"cuda\": ";
#if defined(QUARTERMAP_EMULATION)
    text += "null";
#else
    text += "\"" + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + "\"";
#endif
#if defined(QUARTERMAP_ARCHITECTURES)
    text += ", \"architectures\": \"" QUARTERMAP_ARCHITECTURES "\"";
#else
    text += ", \"architectures\": null";
#endif
    return text + "}}";
}

} // namespace

extern "C" char const* quartermap_plugin_contract(void)
{
    try
    {
        static std::string const text = write_contract();
        return text.c_str();
    }
    catch (...)
    {
        return "{}";
    }
}
