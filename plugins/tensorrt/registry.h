// TensorRT's registry of plugins and its logger, whose functions have another order in 10.x than in 11.x and in TensorRT
// for RTX. Both orders are declared, and the version of the library at hand says which one holds: so one library of ours
// serves them all, whichever it meets.
//
// `tests/native/compare_tensorrt.cpp` compares the orders with the real headers.
#pragma once

#include <cstdint>

#include "interface.h"

namespace quartermap
{

using LibraryHandle = void*;

// `gap_a_b` stands for the functions at the places a to b of the table, which are not called here.
class Registry10
{
public:
    virtual void gap_0() noexcept = 0;
    virtual void gap_1() noexcept = 0;
    virtual void gap_2() noexcept = 0;
    virtual ~Registry10() noexcept = default; // 3 and 4
    virtual void gap_5() noexcept = 0;
    virtual void gap_6() noexcept = 0;
    virtual void gap_7() noexcept = 0;
    virtual void gap_8() noexcept = 0;
    virtual void gap_9() noexcept = 0;
    virtual LibraryHandle loadLibrary(char const* path) noexcept = 0; // 10
    virtual void deregisterLibrary(LibraryHandle handle) noexcept = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator, char const* space) noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* const* getAllCreators(std::int32_t* count) const noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* getCreator(
        char const* name, char const* version, char const* space) noexcept
        = 0;
    virtual bool deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept = 0;
};

class Registry11
{
public:
    virtual ~Registry11() noexcept = default; // 0 and 1
    virtual void gap_2() noexcept = 0;
    virtual void gap_3() noexcept = 0;
    virtual void gap_4() noexcept = 0;
    virtual void gap_5() noexcept = 0;
    virtual LibraryHandle loadLibrary(char const* path) noexcept = 0; // 6
    virtual void deregisterLibrary(LibraryHandle handle) noexcept = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator, char const* space) noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* const* getAllCreators(std::int32_t* count) const noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* getCreator(
        char const* name, char const* version, char const* space) noexcept
        = 0;
    virtual bool deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept = 0;
};

enum class Severity : std::int32_t
{
    kINTERNAL_ERROR = 0,
    kERROR = 1
};

class Logger10
{
public:
    virtual void log(Severity severity, char const* text) noexcept = 0; // 0
    virtual ~Logger10() = default;
};

class Logger11 : public nvinfer1::IVersionedInterface
{
public:
    virtual void log(Severity severity, char const* text) noexcept = 0; // 4
};

class LoggerFinder10
{
public:
    virtual Logger10* findLogger() = 0; // 0

protected:
    virtual ~LoggerFinder10() = default;
};

class LoggerFinder11 : public nvinfer1::IVersionedInterface
{
public:
    virtual Logger11* findLogger() = 0; // 4
};

// Which order a library of TensorRT has.
enum class Order
{
    kUNKNOWN,
    k10,
    k11
};

// The order of a version, as getInferLibVersion gives it: 10.7 is 100700, and RTX, which counts anew, has 10701 for 1.7.1.
// The order of versions that were not looked at is not known.
constexpr Order order_of(std::int32_t version) noexcept
{
    std::int32_t const major = version / 10000;
    bool const rtx = major == 1 && version >= 10700;
    return major == 10 ? Order::k10 : major == 11 || rtx ? Order::k11 : Order::kUNKNOWN;
}

// A registry in either order.
class Registry
{
public:
    Registry() = default;
    Registry(void* registry, Order order) noexcept
        : ten_(order == Order::k10 ? static_cast<Registry10*>(registry) : nullptr)
        , eleven_(order == Order::k11 ? static_cast<Registry11*>(registry) : nullptr)
    {
    }

    explicit operator bool() const noexcept
    {
        return ten_ != nullptr || eleven_ != nullptr;
    }
    LibraryHandle load_library(char const* path) const noexcept
    {
        return ten_ != nullptr ? ten_->loadLibrary(path) : eleven_->loadLibrary(path);
    }
    void deregister_library(LibraryHandle handle) const noexcept
    {
        return ten_ != nullptr ? ten_->deregisterLibrary(handle) : eleven_->deregisterLibrary(handle);
    }
    bool register_creator(nvinfer1::IPluginCreatorInterface& creator, char const* space) const noexcept
    {
        return ten_ != nullptr ? ten_->registerCreator(creator, space) : eleven_->registerCreator(creator, space);
    }
    bool deregister_creator(nvinfer1::IPluginCreatorInterface const& creator) const noexcept
    {
        return ten_ != nullptr ? ten_->deregisterCreator(creator) : eleven_->deregisterCreator(creator);
    }
    nvinfer1::IPluginCreatorInterface* const* all_creators(std::int32_t* count) const noexcept
    {
        return ten_ != nullptr ? ten_->getAllCreators(count) : eleven_->getAllCreators(count);
    }
    nvinfer1::IPluginCreatorInterface* creator(char const* name, char const* version, char const* space) const noexcept
    {
        return ten_ != nullptr ? ten_->getCreator(name, version, space) : eleven_->getCreator(name, version, space);
    }

private:
    Registry10* ten_ = nullptr;
    Registry11* eleven_ = nullptr;
};

} // namespace quartermap
