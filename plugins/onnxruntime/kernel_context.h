// What kernels ask ONNX Runtime for: their node's name and texts, their inputs, and the session's threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "interface.h"
#include "quartermap/cpu_scan.h"
#include "shapes.h"

namespace quartermap::onnxruntime
{

// A text that ONNX Runtime gives in two calls, the first of which asks for its size; `missing` if there is none.
template <typename Read>
std::string read_text(Api const& api, Read const& read, std::string const& missing)
{
    std::size_t size = 0;
    if (Status* const status = read(static_cast<char*>(nullptr), &size))
    {
        api.ReleaseStatus(status);
        if (size == 0)
        {
            return missing;
        }
    }
    std::string text(size, '\0');
    if (Status* const status = read(text.data(), &size))
    {
        api.ReleaseStatus(status);
        return missing;
    }
    text.resize(text.find('\0') < size ? text.find('\0') : size);
    return text;
}

// The name of the node that a kernel is made for; "" for none.
std::string node_name(Api const& api, KernelInfo const* info);

// One input of a node that runs; not `present` where an optional one is missing.
Input read_input(Api const& api, KernelContext* context, std::size_t index);

// Makes an output of a node that runs, and returns where its elements go.
void* make_output(Api const& api, KernelContext* context, std::vector<std::int64_t> const& sizes);

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
