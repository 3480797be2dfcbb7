#include "runtime.h"

#include <cuda_runtime_api.h>

namespace quartermap
{

namespace
{

// The library holds its own CUDA runtime, whose last error no other code of the process sees or clears: left there, it
// would be taken for an error of the next launch.
std::int32_t consumed(cudaError_t error)
{
    if (error == cudaSuccess)
    {
        return QUARTERMAP_SUCCESS;
    }
    static_cast<void>(cudaGetLastError());
    bool const absent = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    return absent ? QUARTERMAP_NO_KERNEL_IMAGE : QUARTERMAP_CUDA_ERROR + static_cast<std::int32_t>(error);
}

cudaError_t attribute(cudaDeviceAttr which, int device, int& value)
{
    return cudaDeviceGetAttribute(&value, which, device);
}

} // namespace

std::int32_t device_limits(DeviceLimits& limits)
{
    int device = 0;
    int multiprocessors = 0;
    int per_block = 0;
    int per_multiprocessor = 0;
    cudaError_t error = cudaGetDevice(&device);
    error = error == cudaSuccess ? attribute(cudaDevAttrMultiProcessorCount, device, multiprocessors) : error;
    error = error == cudaSuccess ? attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, per_block) : error;
    error = error == cudaSuccess
        ? attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, per_multiprocessor)
        : error;
    limits = {multiprocessors, per_block, per_multiprocessor};
    return consumed(error);
}

std::int32_t prepare(Kernel kernel)
{
    DeviceLimits limits{};
    if (std::int32_t const status = device_limits(limits))
    {
        return status;
    }
    auto const* const function = reinterpret_cast<void const*>(kernel);
    cudaFuncAttributes found{};
    cudaError_t error = cudaFuncGetAttributes(&found, function);
    if (error == cudaSuccess)
    {
        // The limit belongs to the kernel and not to a launch, so it is the same for every plan: were it that of one
        // plan, a thread could lower it between another thread's preparation and launch.
        error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(limits.shared_per_block) - static_cast<int>(found.sharedSizeBytes));
    }
    return consumed(error);
}

std::int32_t launch(KernelLaunch const& launch, KernelArguments const& arguments, void* stream)
{
    void* values[] = {const_cast<KernelArguments*>(&arguments)};
    cudaError_t error = cudaLaunchKernel(reinterpret_cast<void const*>(launch.kernel),
        dim3(static_cast<unsigned>(launch.blocks)), dim3(static_cast<unsigned>(launch.threads)), values,
        static_cast<std::size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream));
    error = error == cudaSuccess ? cudaPeekAtLastError() : error;
    return consumed(error);
}

char const* runtime_message(std::int32_t code)
{
    if (code == cudaErrorInsufficientDriver)
    {
        return "there is no NVIDIA driver here, or it is too old for the CUDA runtime that this library was built with; "
               "install a newer driver, or build the library with the CUDA toolkit that fits the driver";
    }
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

} // namespace quartermap
