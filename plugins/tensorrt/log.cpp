#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

#include <dlfcn.h>

namespace quartermap
{

namespace
{

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

} // namespace

int tensorrt_major_of(void const* address) noexcept
{
    Dl_info info{};
    if (address == nullptr || dladdr(address, &info) == 0 || info.dli_fname == nullptr)
    {
        return 0;
    }
    void* const library = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr)
    {
        return 0;
    }
    // TensorRT for RTX counts its versions anew and has a symbol of its own name beside these.
    auto const version = reinterpret_cast<std::int32_t (*)() noexcept>(dlsym(library, "getInferLibVersion"));
    std::int32_t const number = version == nullptr ? 0 : version();
    dlclose(library);
    // 10.x and 11.x count major * 10000 + minor * 100 + patch, as all before them from 10.0 on.
    return number / 10000;
}

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept
{
    // ILoggerFinder's table of functions differs between 10.x and 11.x: calling it across versions would call something
    // else. Its table lies in the library that made it, and that library knows its version.
    bool const same = finder != nullptr
        && tensorrt_major_of(*reinterpret_cast<void const* const*>(finder)) == NV_TENSORRT_MAJOR;
    nvinfer1::ILoggerFinder* expected = nullptr;
    if (same)
    {
        logger_finder.compare_exchange_strong(expected, finder);
    }
}

void log_error(char const* format, ...) noexcept
{
    char text[512];
    int const prefix = std::snprintf(text, sizeof text, "quartermap::SelectiveScan2D: ");
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text + prefix, sizeof text - static_cast<std::size_t>(prefix), format, arguments);
    va_end(arguments);
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    nvinfer1::ILogger* logger = nullptr;
    try
    {
        logger = finder == nullptr ? nullptr : finder->findLogger();
    }
    catch (...)
    {
    }
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text);
    }
    else
    {
        std::fprintf(stderr, "%s\n", text);
    }
}

} // namespace quartermap
