// The threads of the session that runs a kernel, for the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "interface.h"
#include "quartermap/cpu_scan.h"

namespace quartermap::onnxruntime
{

// The pool of the session that runs a kernel.
struct Pool
{
    Api const* api;
    KernelContext* context;
    Status* status; // of what went wrong
};

// A QuartermapCpuParallel whose pool is a Pool.
std::int32_t run_in_pool(void* given, QuartermapCpuTask task, void* argument, std::size_t count);

// Throws what went wrong in a call of the kernels: in ONNX Runtime's threads, or else by its status.
void check_call(Pool const& pool, std::int32_t status);

} // namespace quartermap::onnxruntime
