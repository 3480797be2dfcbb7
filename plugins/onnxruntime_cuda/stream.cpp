#include "stream.h"

#include <cuda_runtime_api.h>

#include "quartermap/selective_scan.h"
#include "status.h"

namespace quartermap::onnxruntime
{
namespace
{

std::int32_t status_of(cudaError_t error)
{
    if (error == cudaSuccess)
    {
        return QUARTERMAP_SUCCESS;
    }
    // The error is returned; left behind, it would be taken for that of a later call.
    static_cast<void>(cudaGetLastError());
    return QUARTERMAP_CUDA_ERROR + static_cast<std::int32_t>(error);
}

} // namespace

char const* stream_provider()
{
    return "CUDAExecutionProvider";
}

void* stream_of(Api const& api, KernelContext* context)
{
    void* stream = nullptr;
    check(api.KernelContext_GetGPUComputeStream(context, &stream));
    return stream;
}

// By CUDA's own pool: what ONNX Runtime's would take back, it could give to another stream while the kernel still runs.
std::int32_t reserve(void** memory, std::size_t bytes, void* stream)
{
    return status_of(cudaMallocAsync(memory, bytes, static_cast<cudaStream_t>(stream)));
}

std::int32_t release(void* memory, void* stream)
{
    return status_of(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

} // namespace quartermap::onnxruntime
