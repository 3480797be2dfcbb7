// The TensorRT plugin SelectiveScan2D over the C interface of the kernels.
//
// One library serves TensorRT 10.7 to 11.x and TensorRT for RTX from 1.7 on: the first version of the V3 interfaces, which
// all of them take. Nothing here throws, so nothing can leave a noexcept function: there are no containers, and `new` is
// asked not to throw.
#pragma once

#include <cstdint>

#include "contract.h"
#include "interface.h"
#include "quartermap/selective_scan.h"

namespace quartermap
{

// What a plugin is created from and what is serialised.
struct Fields
{
    std::int32_t directions[QUARTERMAP_MAX_DIRECTIONS] = {};
    std::int32_t direction_count = 0;
    std::int32_t softplus = 1;
};

// Reads fields; false, with the reason logged, if one is missing, unknown, of another type or without sense.
bool read_fields(nvinfer1::PluginFieldCollection const* collection, Fields& fields) noexcept;

class SelectiveScan2D final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit SelectiveScan2D(Fields const& fields) noexcept;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    std::int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, std::int32_t nbOutputs) noexcept override;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, std::int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, std::int32_t nbInputs) const noexcept override;
    std::int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, std::int32_t nbInputs,
        nvinfer1::DimsExprs const* shapeInputs, std::int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
        std::int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(std::int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
        std::int32_t nbInputs, std::int32_t nbOutputs) noexcept override;
    std::int32_t getNbOutputs() const noexcept override;
    std::size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, std::int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, std::int32_t nbOutputs) const noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;

    // IPluginV3OneRuntime
    std::int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, std::int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, std::int32_t nbOutputs) noexcept override;
    std::int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    Fields fields_;
    QuartermapScanPlan plan_{}; // of the last shape, prepared; all zero before the first
    char direction_names_[QUARTERMAP_MAX_DIRECTIONS * 16] = {};
    char description_[sizeof direction_names_ + 96] = {}; // name, fields and version of the kernels
    nvinfer1::PluginField serialized_[2];
    nvinfer1::PluginFieldCollection collection_{};
};

class SelectiveScan2DCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    SelectiveScan2DCreator() noexcept;
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

private:
    nvinfer1::PluginField fields_[2];
    nvinfer1::PluginFieldCollection collection_{};
};

} // namespace quartermap
