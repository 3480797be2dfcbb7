#include "creator_source.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <dlfcn.h>

#include "checks.h"
#include "contract.h"

namespace quartermap::host
{

using namespace nvinfer1;

namespace
{

int count_listed(quartermap::Registry const& registry)
{
    std::int32_t count = 0;
    IPluginCreatorInterface* const* all = registry.all_creators(&count);
    return static_cast<int>(std::count_if(all, all + count, [](IPluginCreatorInterface* each) {
        return std::strcmp(each->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0
            && std::strcmp(static_cast<IPluginCreatorV3One*>(each)->getPluginNamespace(), kPluginNamespace) == 0;
    }));
}

// What the registry knows under our name.
IPluginCreatorInterface* looked_up(quartermap::Registry const& registry)
{
    return registry.creator(quartermap::kPluginName, quartermap::kPluginVersion, kPluginNamespace);
}

} // namespace

Source from_library(char const* path)
{
    Source source;
    source.opened = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (source.opened == nullptr)
    {
        std::fprintf(stderr, "cannot load the plugin: %s\n", dlerror());
        return source;
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
    auto const get_creators = reinterpret_cast<GetCreators>(dlsym(source.opened, "getCreators"));
    auto const set_finder = reinterpret_cast<void (*)(void*)>(dlsym(source.opened, "setLoggerFinder"));
    check(get_creators != nullptr && set_finder != nullptr, "getCreators and setLoggerFinder are exported");
    if (get_creators != nullptr && set_finder != nullptr)
    {
        set_finder(nullptr);
        std::int32_t count = 0;
        IPluginCreatorInterface* const* creators = get_creators(count);
        check(count == 1, "there is one creator");
        source.creator = static_cast<IPluginCreatorV3One*>(creators[0]);
    }
    return source;
}

Source from_registry(char const* tensorrt, char const* path)
{
    Source source;
    void* const real = dlopen(tensorrt, RTLD_NOW | RTLD_LOCAL);
    auto const version = real == nullptr ? nullptr
                                         : reinterpret_cast<std::int32_t (*)()>(dlsym(real, "getInferLibVersion"));
    auto const get = real == nullptr ? nullptr : reinterpret_cast<void* (*)()>(dlsym(real, "getPluginRegistry"));
    if (version == nullptr || get == nullptr || quartermap::order_of(version()) == quartermap::Order::kUNKNOWN)
    {
        std::fprintf(stderr, "no TensorRT that is known: %s\n", tensorrt);
        return source;
    }
    std::printf("the registry of TensorRT %d\n", static_cast<int>(version()));
    source.registry = quartermap::Registry(get(), quartermap::order_of(version()));
    check(looked_up(source.registry) == nullptr, "the registry does not know the creator before");
    check(source.registry.load_library("/nowhere/libquartermap_plugin.so") == nullptr, "refuses a file that is missing");
    for (int round = 0; round < 2; ++round)
    {
        source.handle = source.registry.load_library(path);
        check(source.handle != nullptr && count_listed(source.registry) == 1, "loads the library and lists its creator");
        if (source.handle == nullptr)
        {
            return source;
        }
        if (round == 0)
        {
            source.registry.deregister_library(source.handle);
            check(looked_up(source.registry) == nullptr && count_listed(source.registry) == 0, "lets go of it");
        }
    }
    source.opened = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    check(source.opened != nullptr && count_listed(source.registry) == 1, "opening it once more changes nothing");
    IPluginCreatorInterface* const found = looked_up(source.registry);
    bool const ours = found != nullptr && std::strcmp(found->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0;
    check(ours, "the registry hands out the creator by its name, version and namespace");
    source.creator = ours ? static_cast<IPluginCreatorV3One*>(found) : nullptr;
    return source;
}

void let_go(Source const& source)
{
    if (source.registry && source.handle != nullptr)
    {
        source.registry.deregister_library(source.handle);
        check(looked_up(source.registry) == nullptr, "lets go of the library at the end");
    }
}

} // namespace quartermap::host
