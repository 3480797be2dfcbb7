// TensorRT's interface for plugins of version 3, as far as the plugin implements it and calls it: TensorRT 10.7 to 11.x
// and TensorRT for RTX from 1.7 on. Declared here so that a C++ compiler and nvcc are all that building needs: no pip
// package of TensorRT brings its headers.
//
// What binds is the order of virtual functions, the layout of structures, the values of enumerations, and the names of
// the classes, which C++ keeps for its casts: hence the namespaces. `tests/native/compare_tensorrt.cpp` compares all of
// it with the real headers, where these are, and tests drive the plugin through the registries of real libraries.
//
// The registry and the logger are not here: their order changed from 10.x to 11.x, and registry.h has both.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace nvinfer1
{

using AsciiChar = char;

enum class DataType : std::int32_t
{
    kFLOAT = 0,
    kHALF = 1,
    kINT8 = 2,
    kINT32 = 3,
    kBOOL = 4,
    kUINT8 = 5,
    kFP8 = 6,
    kBF16 = 7,
    kINT64 = 8
};

enum class TensorFormat : std::int32_t
{
    kLINEAR = 0, // row-major
    kCHW2 = 1,
    kHWC8 = 2,
    kCHW4 = 3,
    kCHW16 = 4,
    kCHW32 = 5,
    kHWC = 8
};

// Sizes of a tensor. -1 stands for one that is not known yet.
struct Dims64
{
    static constexpr std::int32_t MAX_DIMS = 8;

    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};
using Dims = Dims64;

struct PluginTensorDesc
{
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale; // of INT8
};

// A tensor while the engine is built: `desc` with -1 for open sizes, and the ends of the profile.
struct DynamicPluginTensorDesc
{
    PluginTensorDesc desc;
    Dims min;
    Dims max;
    Dims opt;
};

// A size that may be computed from others. The plugin hands them on, and looks into none.
class IDimensionExpr;
class IExprBuilder;
class IPluginResourceContext;

struct DimsExprs
{
    std::int32_t nbDims;
    IDimensionExpr const* d[Dims::MAX_DIMS];
};

// Fields ---------------------------------------------------------------------------------------------------------------

enum class PluginFieldType : std::int32_t
{
    kFLOAT16 = 0,
    kFLOAT32 = 1,
    kFLOAT64 = 2,
    kINT8 = 3,
    kINT16 = 4,
    kINT32 = 5,
    kCHAR = 6,
    kDIMS = 7,
    kUNKNOWN = 8,
    kBF16 = 9,
    kINT64 = 10
};

// One value by name. `length` counts elements of the type.
struct PluginField
{
    AsciiChar const* name = nullptr;
    void const* data = nullptr;
    PluginFieldType type = PluginFieldType::kUNKNOWN;
    std::int32_t length = 0;

    PluginField() = default;
    PluginField(AsciiChar const* called, void const* at, PluginFieldType kind, std::int32_t count) noexcept
        : name(called)
        , data(at)
        , type(kind)
        , length(count)
    {
    }
};

struct PluginFieldCollection
{
    std::int32_t nbFields = 0;
    PluginField const* fields = nullptr;
};

enum class TensorRTPhase : std::int32_t
{
    kBUILD = 0,
    kRUNTIME = 1
};

enum class PluginCapabilityType : std::int32_t
{
    kCORE = 0,
    kBUILD = 1,
    kRUNTIME = 2
};

// What every interface begins with ---------------------------------------------------------------------------------------

// TensorRT tells interfaces apart by these.
struct InterfaceInfo
{
    char const* kind;
    std::int32_t major;
    std::int32_t minor;
};

enum class APILanguage : std::int32_t
{
    kCPP = 0,
    kPYTHON = 1
};

class IVersionedInterface
{
public:
    virtual APILanguage getAPILanguage() const noexcept
    {
        return APILanguage::kCPP;
    }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

namespace v_1_0
{

// The plugin -------------------------------------------------------------------------------------------------------------

class IPluginCapability : public IVersionedInterface
{
};

class IPluginV3 : public IVersionedInterface
{
public:
    InterfaceInfo getInterfaceInfo() const noexcept override
    {
        return {"PLUGIN", 1, 0};
    }
    // NULL for a capability that the plugin has not. It stays the plugin's own.
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability
{
public:
    InterfaceInfo getInterfaceInfo() const noexcept override
    {
        return {"PLUGIN_V3ONE_CORE", 1, 0};
    }
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

// Asked while an engine is built. Functions that return a number return 0 where all is well.
class IPluginV3OneBuild : public IPluginCapability
{
public:
    InterfaceInfo getInterfaceInfo() const noexcept override
    {
        return {"PLUGIN_V3ONE_BUILD", 1, 0};
    }
    virtual std::int32_t configurePlugin(DynamicPluginTensorDesc const* in, std::int32_t nbInputs,
        DynamicPluginTensorDesc const* out, std::int32_t nbOutputs) noexcept
        = 0;
    virtual std::int32_t getOutputDataTypes(DataType* outputTypes, std::int32_t nbOutputs, DataType const* inputTypes,
        std::int32_t nbInputs) const noexcept
        = 0;
    virtual std::int32_t getOutputShapes(DimsExprs const* inputs, std::int32_t nbInputs, DimsExprs const* shapeInputs,
        std::int32_t nbShapeInputs, DimsExprs* outputs, std::int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept
        = 0;
    // Whether tensor `pos` may have its type and format, given those before it.
    virtual bool supportsFormatCombination(std::int32_t pos, DynamicPluginTensorDesc const* inOut,
        std::int32_t nbInputs, std::int32_t nbOutputs) noexcept
        = 0;
    virtual std::int32_t getNbOutputs() const noexcept = 0;
    // Bytes.
    virtual std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* /*inputs*/, std::int32_t /*nbInputs*/,
        DynamicPluginTensorDesc const* /*outputs*/, std::int32_t /*nbOutputs*/) const noexcept
    {
        return 0;
    }
    virtual std::int32_t getValidTactics(std::int32_t* /*tactics*/, std::int32_t /*nbTactics*/) noexcept
    {
        return 0;
    }
    virtual std::int32_t getNbTactics() noexcept
    {
        return 0;
    }
    // Plugins with the same text share what the timing cache knows; none is timed anew every time.
    virtual char const* getTimingCacheID() noexcept
    {
        return nullptr;
    }
    virtual std::int32_t getFormatCombinationLimit() noexcept
    {
        return 100;
    }
    // Shown by the engine inspector.
    virtual char const* getMetadataString() noexcept
    {
        return nullptr;
    }
};

// Asked when an engine runs.
class IPluginV3OneRuntime : public IPluginCapability
{
public:
    InterfaceInfo getInterfaceInfo() const noexcept override
    {
        return {"PLUGIN_V3ONE_RUNTIME", 1, 0};
    }
    virtual std::int32_t setTactic(std::int32_t /*tactic*/) noexcept
    {
        return 0;
    }
    virtual std::int32_t onShapeChange(PluginTensorDesc const* in, std::int32_t nbInputs, PluginTensorDesc const* out,
        std::int32_t nbOutputs) noexcept
        = 0;
    virtual std::int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
        = 0;
    // A plugin for one execution context, which the context owns.
    virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
    // What the creator is given when the engine is read again.
    virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

// The creator ------------------------------------------------------------------------------------------------------------

class IPluginCreatorInterface : public IVersionedInterface
{
};

class IPluginCreatorV3One : public IPluginCreatorInterface
{
public:
    InterfaceInfo getInterfaceInfo() const noexcept override
    {
        return {"PLUGIN CREATOR_V3ONE", 1, 0};
    }
    // NULL where the fields do not fit. The caller owns the plugin.
    virtual IPluginV3* createPlugin(
        AsciiChar const* name, PluginFieldCollection const* fc, TensorRTPhase phase) noexcept
        = 0;
    // Names and types of the fields, without values.
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

} // namespace v_1_0

using v_1_0::IPluginCapability;
using v_1_0::IPluginCreatorInterface;
using v_1_0::IPluginCreatorV3One;
using v_1_0::IPluginV3;
using v_1_0::IPluginV3OneBuild;
using v_1_0::IPluginV3OneCore;
using v_1_0::IPluginV3OneRuntime;

} // namespace nvinfer1
