#include "device_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if !defined(QUARTERMAP_EMULATION)
#include <cuda_runtime_api.h>
#endif

namespace quartermap::host
{

Memory::Memory(std::size_t bytes)
    : bytes_(std::max<std::size_t>(bytes, 1))
{
#if defined(QUARTERMAP_EMULATION)
    data_ = std::malloc(bytes_);
    std::memset(data_, 0xff, bytes_);
#else
    fine_ = cudaMalloc(&data_, bytes_) == cudaSuccess && cudaMemset(data_, 0xff, bytes_) == cudaSuccess;
#endif
}

Memory::Memory(Memory&& other) noexcept
    : bytes_(other.bytes_)
    , data_(other.data_)
    , fine_(other.fine_)
{
    other.data_ = nullptr;
}

Memory::~Memory()
{
#if defined(QUARTERMAP_EMULATION)
    std::free(data_);
#else
    cudaFree(data_);
#endif
}

void* Memory::get() const
{
    return data_;
}

bool Memory::write(void const* from, std::size_t bytes)
{
#if defined(QUARTERMAP_EMULATION)
    std::memcpy(data_, from, bytes);
    return true;
#else
    return fine_ && cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess;
#endif
}

bool Memory::read(void* to, std::size_t bytes) const
{
#if defined(QUARTERMAP_EMULATION)
    std::memcpy(to, data_, bytes);
    return true;
#else
    return fine_ && cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost) == cudaSuccess;
#endif
}

bool device_present()
{
#if defined(QUARTERMAP_EMULATION)
    return true;
#else
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
#endif
}

bool synchronise()
{
#if defined(QUARTERMAP_EMULATION)
    return true;
#else
    return cudaDeviceSynchronize() == cudaSuccess;
#endif
}

} // namespace quartermap::host
