#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

#include <dlfcn.h>

namespace quartermap
{

namespace
{

std::atomic<LoggerFinder10*> finder_10{nullptr};
std::atomic<LoggerFinder11*> finder_11{nullptr};

template <typename Finder>
bool log_by(std::atomic<Finder*> const& held, char const* text) noexcept
{
    Finder* const finder = held.load();
    try
    {
        if (auto* const logger = finder == nullptr ? nullptr : finder->findLogger())
        {
            logger->log(Severity::kERROR, text);
            return true;
        }
    }
    catch (...)
    {
    }
    return false;
}

} // namespace

Order order_at(void const* address) noexcept
{
    Dl_info info{};
    if (address == nullptr || dladdr(address, &info) == 0 || info.dli_fname == nullptr)
    {
        return Order::kUNKNOWN;
    }
    void* const library = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr)
    {
        return Order::kUNKNOWN;
    }
    auto const version = reinterpret_cast<std::int32_t (*)() noexcept>(dlsym(library, "getInferLibVersion"));
    Order const found = version == nullptr ? Order::kUNKNOWN : order_of(version());
    dlclose(library);
    return found;
}

void set_logger_finder(void* finder) noexcept
{
    if (finder == nullptr)
    {
        return;
    }
    // Its table of functions lies in the library that made it, and that library knows its version. The first one is kept.
    Order const order = order_at(*static_cast<void const* const*>(finder));
    LoggerFinder10* none_10 = nullptr;
    LoggerFinder11* none_11 = nullptr;
    if (order == Order::k10)
    {
        finder_10.compare_exchange_strong(none_10, static_cast<LoggerFinder10*>(finder));
    }
    else if (order == Order::k11)
    {
        finder_11.compare_exchange_strong(none_11, static_cast<LoggerFinder11*>(finder));
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
    if (!log_by(finder_11, text) && !log_by(finder_10, text))
    {
        std::fprintf(stderr, "%s\n", text);
    }
}

} // namespace quartermap
