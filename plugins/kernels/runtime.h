// What the host asks of the device's runtime. On a device that is CUDA's (runtime.cpp); for tests on a CPU it is
// emulation/emulated_runtime.cpp.
#pragma once

#include "kernel_arguments.h"

namespace quartermap
{

// Each returns a QuartermapStatus, to which the runtime's own code is added.
std::int32_t device_limits(DeviceLimits& limits);
std::int32_t prepare(Kernel kernel);
std::int32_t launch(KernelLaunch const& launch, KernelArguments const& arguments, void* stream);

// Words for a code of the runtime; never NULL.
char const* runtime_message(std::int32_t code);

} // namespace quartermap
