// How the plugin comes to be known, in two ways:
//
//   getCreators          trtexec, the Python registry and engines that carry their plugin library call it after loading
//                        this library.
//   static registration  a plain dlopen, as Triton's backend and trtexec --staticPlugins do it, calls nothing. So this
//                        library registers itself as it is loaded, with the TensorRT that is in the process by then, if
//                        it is of our version. One that comes later is not heard of: whoever loads plugins first
//                        (polygraphy, LD_PRELOAD) has to load TensorRT before; see docs/plugin.md.
//
// The registry is found at run time instead of being linked: a library that asks for libnvinfer.so.10 could not be loaded
// beside another TensorRT, nor checked on a machine that has none.
#include <atomic>
#include <initializer_list>

#include <dlfcn.h>

#include "log.h"
#include "plugin.h"

namespace
{

using nvinfer1::IPluginRegistry;

quartermap::SelectiveScan2DCreator& creator() noexcept
{
    static quartermap::SelectiveScan2DCreator instance;
    return instance;
}

#define QUARTERMAP_TEXT_(x) #x
#define QUARTERMAP_TEXT(x) QUARTERMAP_TEXT_(x)
#define QUARTERMAP_MAJOR QUARTERMAP_TEXT(NV_TENSORRT_MAJOR)

using GetRegistry = IPluginRegistry* (*)() noexcept;

GetRegistry registry_in(void* library) noexcept
{
    void* const symbol = dlsym(library, "getPluginRegistry");
    bool const ours = symbol != nullptr && quartermap::tensorrt_major_of(symbol) == NV_TENSORRT_MAJOR;
    return ours ? reinterpret_cast<GetRegistry>(symbol) : nullptr;
}

IPluginRegistry* find_registry() noexcept
{
    if (GetRegistry const get = registry_in(RTLD_DEFAULT))
    {
        return get();
    }
#if defined(QUARTERMAP_TEST_REGISTRY)
    // For a test without a GPU: TensorRT for RTX, whose registry is that of 11.x.
    if (void* const library = dlopen(QUARTERMAP_TEST_REGISTRY, RTLD_NOLOAD | RTLD_LAZY))
    {
        void* const symbol = dlsym(library, "getPluginRegistry");
        dlclose(library);
        return symbol == nullptr ? nullptr : reinterpret_cast<GetRegistry>(symbol)();
    }
#endif
    // Loaded, but for the one who loaded it alone: Python does so, and Triton's backends.
    for (char const* name : {"libnvinfer.so." QUARTERMAP_MAJOR, "libnvinfer_lean.so." QUARTERMAP_MAJOR,
             "libnvinfer_dispatch.so." QUARTERMAP_MAJOR})
    {
        if (void* const library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY))
        {
            GetRegistry const get = registry_in(library);
            IPluginRegistry* const registry = get == nullptr ? nullptr : get();
            dlclose(library);
            if (registry != nullptr)
            {
                return registry;
            }
        }
    }
    return nullptr;
}

class StaticRegistration
{
public:
    StaticRegistration() noexcept
    {
        IPluginRegistry* const registry = find_registry();
        if (registry != nullptr && registry->registerCreator(creator(), quartermap::kPluginNamespace))
        {
            registry_ = registry;
        }
    }

    // The library may be closed before TensorRT is; the registry, made before this object, still stands then.
    ~StaticRegistration()
    {
        undo();
    }

    void undo() noexcept
    {
        if (IPluginRegistry* const registry = registry_.exchange(nullptr))
        {
            registry->deregisterCreator(creator());
        }
    }

private:
    std::atomic<IPluginRegistry*> registry_{nullptr};
};

StaticRegistration registration;

} // namespace

extern "C" QUARTERMAP_API nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& nbCreators)
{
    // A registry refuses a library whose creators it knows already, and it knows ours since it opened the library. Who asks
    // for the creators is about to register them itself.
    registration.undo();
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator()};
    nbCreators = 1;
    return creators;
}

extern "C" QUARTERMAP_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    quartermap::set_logger_finder(finder);
}
