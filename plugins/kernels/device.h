// The few things that a kernel asks of its machine: who am I, wait for the block, exchange within a warp, shared memory,
// and two fast functions. On a device they are CUDA's; on the host they are emulation/emulated_device.h's, which runs the
// same kernel, every barrier and exchange included, with one fibre for each thread.
#pragma once

#include "host_device.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define QUARTERMAP_DEVICE __device__ __forceinline__
#define QUARTERMAP_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define QUARTERMAP_UNROLL _Pragma("unroll")
#define QUARTERMAP_UNROLL_BY_4 _Pragma("unroll 4")
#define QUARTERMAP_NO_UNROLL _Pragma("unroll 1")

namespace quartermap
{

QUARTERMAP_DEVICE int thread_index()
{
    return static_cast<int>(threadIdx.x);
}

QUARTERMAP_DEVICE int thread_count()
{
    return static_cast<int>(blockDim.x);
}

QUARTERMAP_DEVICE unsigned block_index()
{
    return blockIdx.x;
}

QUARTERMAP_DEVICE char* shared_memory()
{
    extern __shared__ __align__(16) char memory[];
    return memory;
}

QUARTERMAP_DEVICE void wait_for_block()
{
    __syncthreads();
}

// The value of the lane `distance` before this one among `width` lanes; the first lanes get their own.
QUARTERMAP_DEVICE float from_earlier_lane(float value, int distance, int width)
{
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(distance), width);
}

// The value of one lane among `width` lanes.
QUARTERMAP_DEVICE float from_lane(float value, int lane, int width)
{
    return __shfl_sync(0xffffffffu, value, lane, width);
}

// 2^x with a relative error of 2^-22; results below the normal numbers are zero, as a state so far away is forgotten.
QUARTERMAP_DEVICE float power_of_two(float x)
{
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1/x with an error of one unit in the last place.
QUARTERMAP_DEVICE float reciprocal(float x)
{
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Memory that no thread of the launch writes.
template <typename T>
QUARTERMAP_DEVICE T read_only(T const* where)
{
    return __ldg(where);
}

} // namespace quartermap

#else

#include "emulated_device.h"

#endif
