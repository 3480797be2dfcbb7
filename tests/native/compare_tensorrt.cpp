// Compares what plugins/tensorrt/ declares of TensorRT with its real headers: the layout of every structure, the value of
// every constant, the place, the arguments and the result of every virtual function, how long each table of functions is,
// and the names of the classes. Values and layouts at compile time; the rest when it runs, which ends with 0 if all agree.
//
// The declared namespace has the same name as the real one, so it gets another one here.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <typeinfo>

#define nvinfer1 ours
#include "registry.h"
#undef nvinfer1

#include <NvInferRuntime.h>

namespace theirs = nvinfer1;

#define SAME_VALUE(name)                                                                                               \
    static_assert(static_cast<int>(ours::name) == static_cast<int>(theirs::name), #name " is another number");         \
    static_assert(sizeof(ours::name) == sizeof(theirs::name), #name " has another size")
#define SAME_SIZE(type)                                                                                                \
    static_assert(sizeof(ours::type) == sizeof(theirs::type), #type " has another size");                              \
    static_assert(alignof(ours::type) == alignof(theirs::type), #type " is aligned otherwise")
#define SAME_PLACE(type, member)                                                                                       \
    static_assert(offsetof(ours::type, member) == offsetof(theirs::type, member), #type "::" #member " lies elsewhere"); \
    static_assert(sizeof(ours::type::member) == sizeof(theirs::type::member), #type "::" #member " has another size")

static_assert(NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1007, "these headers are older than what is supported");

SAME_VALUE(DataType::kFLOAT);
SAME_VALUE(DataType::kHALF);
SAME_VALUE(DataType::kINT8);
SAME_VALUE(DataType::kINT32);
SAME_VALUE(DataType::kBOOL);
SAME_VALUE(DataType::kUINT8);
SAME_VALUE(DataType::kFP8);
SAME_VALUE(DataType::kBF16);
SAME_VALUE(DataType::kINT64);
SAME_VALUE(TensorFormat::kLINEAR);
SAME_VALUE(TensorFormat::kCHW2);
SAME_VALUE(TensorFormat::kHWC8);
SAME_VALUE(TensorFormat::kCHW4);
SAME_VALUE(TensorFormat::kCHW16);
SAME_VALUE(TensorFormat::kCHW32);
SAME_VALUE(TensorFormat::kHWC);
SAME_VALUE(PluginFieldType::kFLOAT16);
SAME_VALUE(PluginFieldType::kFLOAT32);
SAME_VALUE(PluginFieldType::kFLOAT64);
SAME_VALUE(PluginFieldType::kINT8);
SAME_VALUE(PluginFieldType::kINT16);
SAME_VALUE(PluginFieldType::kINT32);
SAME_VALUE(PluginFieldType::kCHAR);
SAME_VALUE(PluginFieldType::kDIMS);
SAME_VALUE(PluginFieldType::kUNKNOWN);
SAME_VALUE(PluginFieldType::kBF16);
SAME_VALUE(PluginFieldType::kINT64);
SAME_VALUE(TensorRTPhase::kBUILD);
SAME_VALUE(TensorRTPhase::kRUNTIME);
SAME_VALUE(PluginCapabilityType::kCORE);
SAME_VALUE(PluginCapabilityType::kBUILD);
SAME_VALUE(PluginCapabilityType::kRUNTIME);
SAME_VALUE(APILanguage::kCPP);
SAME_VALUE(APILanguage::kPYTHON);
SAME_VALUE(Dims::MAX_DIMS);
static_assert(static_cast<int>(quartermap::Severity::kINTERNAL_ERROR)
    == static_cast<int>(theirs::ILogger::Severity::kINTERNAL_ERROR));
static_assert(static_cast<int>(quartermap::Severity::kERROR) == static_cast<int>(theirs::ILogger::Severity::kERROR));

SAME_SIZE(Dims64);
SAME_PLACE(Dims64, nbDims);
SAME_PLACE(Dims64, d);
SAME_SIZE(PluginTensorDesc);
SAME_PLACE(PluginTensorDesc, dims);
SAME_PLACE(PluginTensorDesc, type);
SAME_PLACE(PluginTensorDesc, format);
SAME_PLACE(PluginTensorDesc, scale);
SAME_SIZE(DynamicPluginTensorDesc);
SAME_PLACE(DynamicPluginTensorDesc, desc);
SAME_PLACE(DynamicPluginTensorDesc, min);
SAME_PLACE(DynamicPluginTensorDesc, max);
SAME_PLACE(DynamicPluginTensorDesc, opt);
SAME_SIZE(DimsExprs);
SAME_PLACE(DimsExprs, nbDims);
SAME_PLACE(DimsExprs, d);
SAME_SIZE(PluginField);
SAME_PLACE(PluginField, name);
SAME_PLACE(PluginField, data);
SAME_PLACE(PluginField, type);
SAME_PLACE(PluginField, length);
SAME_SIZE(PluginFieldCollection);
SAME_PLACE(PluginFieldCollection, nbFields);
SAME_PLACE(PluginFieldCollection, fields);
SAME_SIZE(InterfaceInfo);
SAME_PLACE(InterfaceInfo, kind);
SAME_PLACE(InterfaceInfo, major);
SAME_PLACE(InterfaceInfo, minor);

namespace
{

int failures = 0;
int compared = 0;

void check(bool same, char const* type, char const* name, char const* what)
{
    ++compared;
    if (!same)
    {
        ++failures;
        std::printf("%s%s%s %s\n", type, *name == '\0' ? "" : "::", name, what);
    }
}

// What a function looks like to its caller: classes of other names behind pointers and references are the same there.
template <std::size_t kSize>
struct Bytes
{
};

template <typename T>
auto form_of()
{
    if constexpr (std::is_pointer_v<T> || std::is_reference_v<T>)
    {
        return static_cast<void**>(nullptr);
    }
    else if constexpr (std::is_enum_v<T>)
    {
        return static_cast<std::underlying_type_t<T>*>(nullptr);
    }
    else if constexpr (std::is_class_v<T>)
    {
        return static_cast<Bytes<sizeof(T)>*>(nullptr);
    }
    else
    {
        return static_cast<T*>(nullptr);
    }
}

template <typename T>
using Form = decltype(form_of<T>());

template <typename Function>
struct Called;
template <typename C, typename R, typename... A>
struct Called<R (C::*)(A...)>
{
    using type = std::false_type (*)(Form<R>, Form<A>...);
};
template <typename C, typename R, typename... A>
struct Called<R (C::*)(A...) const>
{
    using type = std::true_type (*)(Form<R>, Form<A>...);
};
template <typename C, typename R, typename... A>
struct Called<R (C::*)(A...) noexcept> : Called<R (C::*)(A...)>
{
};
template <typename C, typename R, typename... A>
struct Called<R (C::*)(A...) const noexcept> : Called<R (C::*)(A...) const>
{
};

// A pointer to a virtual member function holds its place in the table.
template <typename Ours, typename Theirs>
bool same_place(Ours own, Theirs real)
{
    static_assert(sizeof own == sizeof real);
    return std::memcmp(&own, &real, sizeof own) == 0;
}

template <typename Ours, typename Theirs>
void compare_function(Ours own, Theirs real, char const* type, char const* name)
{
    static_assert(std::is_same_v<typename Called<Ours>::type, typename Called<Theirs>::type>, "another signature");
    check(same_place(own, real), type, name, "has another place in the table");
}

template <typename Interface>
struct Longer : Interface
{
    virtual void behind_the_last();
};

template <typename Ours, typename Theirs>
void compare_length(char const* type)
{
    check(same_place(&Longer<Ours>::behind_the_last, &Longer<Theirs>::behind_the_last), type, "",
        "has a table of another length");
}

template <typename T>
std::string name_of(std::string const& space)
{
    std::string const name = typeid(T).name();
    std::size_t const at = name.find(space);
    return at == std::string::npos ? name : name.substr(at + space.size());
}

template <typename Ours, typename Theirs>
void compare_class(char const* type)
{
    check(name_of<Ours>("4ours") == name_of<Theirs>("8nvinfer1"), type, "", "has another name");
    compare_length<Ours, Theirs>(type);
}

// What an interface says that it is. The function does not look at its object.
template <typename Interface>
auto info_of()
{
    alignas(Interface) unsigned char const memory[sizeof(Interface)] = {};
    return reinterpret_cast<Interface const*>(memory)->Interface::getInterfaceInfo();
}

template <typename Ours, typename Theirs>
void compare_info(char const* type)
{
    auto const own = info_of<Ours>();
    auto const real = info_of<Theirs>();
    bool const same = std::strcmp(own.kind, real.kind) == 0 && own.major == real.major && own.minor == real.minor;
    check(same, type, "getInterfaceInfo", "gives another kind or version");
}

#define SAME_CLASS(type) compare_class<ours::type, theirs::type>(#type)
#define SAME_INFO(type) compare_info<ours::type, theirs::type>(#type)
#define SAME_FUNCTION(type, name) compare_function(&ours::type::name, &theirs::type::name, #type, #name)

void compare_plugin()
{
    SAME_CLASS(IVersionedInterface);
    SAME_FUNCTION(IVersionedInterface, getAPILanguage);
    SAME_FUNCTION(IVersionedInterface, getInterfaceInfo);
    SAME_CLASS(IPluginCapability);
    SAME_CLASS(IPluginV3);
    SAME_INFO(IPluginV3);
    SAME_FUNCTION(IPluginV3, getCapabilityInterface);
    SAME_FUNCTION(IPluginV3, clone);
    SAME_CLASS(IPluginV3OneCore);
    SAME_INFO(IPluginV3OneCore);
    SAME_FUNCTION(IPluginV3OneCore, getPluginName);
    SAME_FUNCTION(IPluginV3OneCore, getPluginVersion);
    SAME_FUNCTION(IPluginV3OneCore, getPluginNamespace);
    SAME_CLASS(IPluginV3OneBuild);
    SAME_INFO(IPluginV3OneBuild);
    SAME_FUNCTION(IPluginV3OneBuild, configurePlugin);
    SAME_FUNCTION(IPluginV3OneBuild, getOutputDataTypes);
    SAME_FUNCTION(IPluginV3OneBuild, getOutputShapes);
    SAME_FUNCTION(IPluginV3OneBuild, supportsFormatCombination);
    SAME_FUNCTION(IPluginV3OneBuild, getNbOutputs);
    SAME_FUNCTION(IPluginV3OneBuild, getWorkspaceSize);
    SAME_FUNCTION(IPluginV3OneBuild, getValidTactics);
    SAME_FUNCTION(IPluginV3OneBuild, getNbTactics);
    SAME_FUNCTION(IPluginV3OneBuild, getTimingCacheID);
    SAME_FUNCTION(IPluginV3OneBuild, getFormatCombinationLimit);
    SAME_FUNCTION(IPluginV3OneBuild, getMetadataString);
    SAME_CLASS(IPluginV3OneRuntime);
    SAME_INFO(IPluginV3OneRuntime);
    SAME_FUNCTION(IPluginV3OneRuntime, setTactic);
    SAME_FUNCTION(IPluginV3OneRuntime, onShapeChange);
    SAME_FUNCTION(IPluginV3OneRuntime, enqueue);
    SAME_FUNCTION(IPluginV3OneRuntime, attachToContext);
    SAME_FUNCTION(IPluginV3OneRuntime, getFieldsToSerialize);
    SAME_CLASS(IPluginCreatorInterface);
    SAME_CLASS(IPluginCreatorV3One);
    SAME_INFO(IPluginCreatorV3One);
    SAME_FUNCTION(IPluginCreatorV3One, createPlugin);
    SAME_FUNCTION(IPluginCreatorV3One, getFieldNames);
    SAME_FUNCTION(IPluginCreatorV3One, getPluginName);
    SAME_FUNCTION(IPluginCreatorV3One, getPluginVersion);
    SAME_FUNCTION(IPluginCreatorV3One, getPluginNamespace);
}

#if NV_TENSORRT_MAJOR == 10
using Registry = quartermap::Registry10;
using Logger = quartermap::Logger10;
using LoggerFinder = quartermap::LoggerFinder10;
constexpr quartermap::Order kOrder = quartermap::Order::k10;
#else
using Registry = quartermap::Registry11;
using Logger = quartermap::Logger11;
using LoggerFinder = quartermap::LoggerFinder11;
constexpr quartermap::Order kOrder = quartermap::Order::k11;
#endif
static_assert(quartermap::order_of(NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100) == kOrder);

// Nothing is derived from the registry, so what comes behind the functions that are called does not matter.
#define IN_REGISTRY(name)                                                                                              \
    compare_function(&Registry::name, &theirs::IPluginRegistry::name, "IPluginRegistry", #name)

void compare_registry()
{
    IN_REGISTRY(loadLibrary);
    IN_REGISTRY(deregisterLibrary);
    IN_REGISTRY(getAllCreators);
    IN_REGISTRY(getCreator);
    // TensorRT 10 has functions of these names for older creators, too.
    using Theirs = theirs::IPluginRegistry;
    using Register = bool (Theirs::*)(theirs::IPluginCreatorInterface&, theirs::AsciiChar const*) noexcept;
    using Deregister = bool (Theirs::*)(theirs::IPluginCreatorInterface const&) noexcept;
    compare_function(&Registry::registerCreator, static_cast<Register>(&Theirs::registerCreator), "IPluginRegistry",
        "registerCreator");
    compare_function(&Registry::deregisterCreator, static_cast<Deregister>(&Theirs::deregisterCreator),
        "IPluginRegistry", "deregisterCreator");
    compare_function(&Logger::log, &theirs::ILogger::log, "ILogger", "log");
    compare_function(&LoggerFinder::findLogger, &theirs::ILoggerFinder::findLogger, "ILoggerFinder", "findLogger");
}

} // namespace

int main()
{
    compare_plugin();
    compare_registry();
    std::printf("TensorRT %d.%d: %d functions, tables and names compared, %d differ\n", NV_TENSORRT_MAJOR,
        NV_TENSORRT_MINOR, compared, failures);
    return failures == 0 ? 0 : 1;
}
