#include <cstdlib>

#include "quartermap/selective_scan.h"
#include "stream.h"

namespace quartermap::onnxruntime
{

char const* stream_provider()
{
    return nullptr;
}

void* stream_of(Api const& /*api*/, KernelContext* /*context*/)
{
    return nullptr;
}

// Aligned as CUDA aligns memory, which the kernels may rely on.
std::int32_t reserve(void** memory, std::size_t bytes, void* /*stream*/)
{
    constexpr std::size_t ALIGNMENT = 256;
    *memory = std::aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    constexpr std::int32_t OUT_OF_MEMORY = 2;
    return *memory != nullptr ? QUARTERMAP_SUCCESS : QUARTERMAP_CUDA_ERROR + OUT_OF_MEMORY;
}

std::int32_t release(void* memory, void* /*stream*/)
{
    std::free(memory);
    return QUARTERMAP_SUCCESS;
}

} // namespace quartermap::onnxruntime
