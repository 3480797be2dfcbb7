// Element types of the feature maps, and their conversion to and from float32.
//
// On a device these are CUDA's own types. Compiled for the host alone (emulation/), they are two bytes with conversions
// written out, so that the kernels can be run on a machine without the CUDA toolkit.
#pragma once

#include <cstdint>

#include "device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cstring>
#endif

namespace quartermap
{

#if defined(__CUDACC__)

using Float16 = __half;
using BFloat16 = __nv_bfloat16;

QUARTERMAP_INLINE float to_float(Float16 value)
{
    return __half2float(value);
}

QUARTERMAP_INLINE float to_float(BFloat16 value)
{
    return __bfloat162float(value);
}

QUARTERMAP_INLINE void store(float value, Float16& where)
{
    where = __float2half_rn(value);
}

QUARTERMAP_INLINE void store(float value, BFloat16& where)
{
    where = __float2bfloat16_rn(value);
}

#else

struct Float16
{
    std::uint16_t bits;
};

struct BFloat16
{
    std::uint16_t bits;
};

inline std::uint32_t bits_of(float value)
{
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(Float16 value)
{
    std::uint32_t const sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    std::uint32_t const rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00u)
    {
        return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    }
    // Moves the exponent by a product, which is exact and treats subnormal numbers like all others.
    float const magnitude = float_of(rest << 13) * float_of(0x77800000u); // 2^112
    return float_of(sign | bits_of(magnitude));
}

inline float to_float(BFloat16 value)
{
    return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}

inline void store(float value, BFloat16& where)
{
    std::uint32_t const bits = bits_of(value);
    bool const nan = (bits & 0x7fffffffu) > 0x7f800000u;
    where.bits = static_cast<std::uint16_t>(nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store(float value, Float16& where)
{
    std::uint32_t const bits = bits_of(value);
    std::uint32_t const sign = (bits >> 16) & 0x8000u;
    std::uint32_t const rest = bits & 0x7fffffffu;
    std::uint32_t result;
    if (rest > 0x7f800000u)
    {
        result = 0x7fffu;
    }
    else if (rest >= 0x477ff000u) // rounds to 2^16 or more
    {
        result = 0x7c00u;
    }
    else if (rest < 0x38800000u) // subnormal: adding 0.5 leaves the 10 bits in the lowest bits, rounded
    {
        result = bits_of(float_of(rest) + 0.5F) - bits_of(0.5F);
    }
    else
    {
        result = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
    }
    where.bits = static_cast<std::uint16_t>(sign | result);
}

#endif

QUARTERMAP_INLINE float to_float(float value)
{
    return value;
}

QUARTERMAP_INLINE void store(float value, float& where)
{
    where = value;
}

} // namespace quartermap
