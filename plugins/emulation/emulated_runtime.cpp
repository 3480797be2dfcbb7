// The runtime of the emulated device, as strict as CUDA's and at one point stricter: every kernel has to be prepared.
#include "runtime.h"

#include <mutex>
#include <set>

#include "emulated_device.h"

namespace quartermap
{

namespace
{

// An H100.
constexpr DeviceLimits kLimits{132, 227 * 1024, 228 * 1024};

// As CUDA numbers them.
constexpr std::int32_t kInvalidValue = 1;
constexpr std::int32_t kInvalidConfiguration = 9;
constexpr std::int32_t kLaunchFailure = 719;

// The device runs one kernel at a time; all that it knows is behind this.
std::mutex device;
std::set<Kernel> prepared;
unsigned preparations = 0;

std::int32_t failed(std::int32_t code)
{
    return QUARTERMAP_CUDA_ERROR + code;
}

} // namespace

std::int32_t device_limits(DeviceLimits& limits)
{
    limits = kLimits;
    return QUARTERMAP_SUCCESS;
}

std::int32_t prepare(Kernel kernel)
{
    std::lock_guard<std::mutex> const lock(device);
    prepared.insert(kernel);
    ++preparations;
    return QUARTERMAP_SUCCESS;
}

std::int32_t launch(KernelLaunch const& launch, KernelArguments const& arguments, void* /*stream*/)
{
    std::lock_guard<std::mutex> const lock(device);
    if (launch.blocks < 1 || launch.threads < 1)
    {
        return failed(kInvalidConfiguration);
    }
    if (launch.shared_bytes > kLimits.shared_per_block || prepared.count(launch.kernel) == 0)
    {
        return failed(kInvalidValue);
    }
    auto const body = [&] { launch.kernel(arguments); };
    bool const fine = emulation::run(body, static_cast<unsigned>(launch.blocks), launch.threads, launch.shared_bytes);
    return fine ? QUARTERMAP_SUCCESS : failed(kLaunchFailure);
}

char const* runtime_message(std::int32_t code)
{
    switch (code)
    {
    case kInvalidValue: return "the emulated kernel was not prepared, or asks for too much shared memory";
    case kInvalidConfiguration: return "the emulated launch has no blocks or no threads";
    default: return "the emulated kernel failed";
    }
}

} // namespace quartermap

// How often kernels have been prepared, for tests.
extern "C" __attribute__((visibility("default"))) unsigned quartermap_emulation_preparations(void)
{
    std::lock_guard<std::mutex> const lock(quartermap::device);
    return quartermap::preparations;
}
