// How the plugin comes to be known, in two ways:
//
//   getCreators          trtexec, the Python registry and engines that carry their plugin library call it after loading
//                        this library.
//   static registration  a plain dlopen, as Triton's backend and trtexec --staticPlugins do it, calls nothing. So this
//                        library registers itself as it is loaded, with the TensorRT that is in the process by then, if
//                        it is of a version whose registry we know. One that comes later is not heard of: whoever loads
//                        plugins first (polygraphy, LD_PRELOAD) has to load TensorRT before; see docs/plugin.md.
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

using quartermap::Registry;

quartermap::SelectiveScan2DCreator& creator() noexcept
{
    static quartermap::SelectiveScan2DCreator instance;
    return instance;
}

Registry registry_in(void* library) noexcept
{
    void* const symbol = dlsym(library, "getPluginRegistry");
    quartermap::Order const order = quartermap::order_at(symbol);
    if (order == quartermap::Order::kUNKNOWN)
    {
        return Registry();
    }
    return Registry(reinterpret_cast<void* (*)() noexcept>(symbol)(), order);
}

Registry find_registry() noexcept
{
    if (Registry const found = registry_in(RTLD_DEFAULT))
    {
        return found;
    }
    // Loaded, but for the one who loaded it alone: Python does so, and Triton's backends.
    for (char const* name : {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1", "libnvinfer_lean.so.11",
             "libnvinfer_lean.so.10", "libnvinfer_dispatch.so.11", "libnvinfer_dispatch.so.10"})
    {
        if (void* const library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY))
        {
            Registry const found = registry_in(library);
            dlclose(library);
            if (found)
            {
                return found;
            }
        }
    }
    return Registry();
}

class StaticRegistration
{
public:
    StaticRegistration() noexcept
        : registry_(find_registry())
    {
        registered_ = registry_ && registry_.register_creator(creator(), quartermap::kPluginNamespace);
    }

    // The library may be closed before TensorRT is; the registry, made before this object, still stands then.
    ~StaticRegistration()
    {
        undo();
    }

    void undo() noexcept
    {
        if (registered_.exchange(false))
        {
            registry_.deregister_creator(creator());
        }
    }

private:
    Registry registry_;
    std::atomic<bool> registered_{false};
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

// The finder is one of LoggerFinder10 and LoggerFinder11.
extern "C" QUARTERMAP_API void setLoggerFinder(void* finder)
{
    quartermap::set_logger_finder(finder);
}
