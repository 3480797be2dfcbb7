// One layer normalisation of maps over their channels: what the kernels of every instruction set are given.
#pragma once

#include <cstddef>

namespace quartermap::cpu
{

struct NormJob
{
    std::size_t channels;
    std::size_t positions; // of one map
    float epsilon;
    float const* x;     // (images, channels, positions)
    float const* scale; // (channels)
    float const* bias;  // (channels)
    float* y;           // (images, channels, positions)
};

} // namespace quartermap::cpu
