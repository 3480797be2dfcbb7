// How a function is marked that both the host's plans and the kernels use.
#pragma once

#if defined(__CUDACC__)
#define QUARTERMAP_INLINE __host__ __device__ __forceinline__
#else
#define QUARTERMAP_INLINE inline
#endif
