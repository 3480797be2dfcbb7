// What the inputs of the operators have to look like.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "quartermap/cpu_norm.h"
#include "quartermap/cpu_scan.h"

namespace quartermap::onnxruntime
{

// One input as it was found.
struct Input
{
    bool present{false};
    std::vector<std::int64_t> sizes;
    void const* data{nullptr};
};

// The sizes of a SelectiveScan2D, whose inputs are x, dt, B, C, A, D, dt_bias and, where it is there, dt_weight.
// `directions` is how many there are. Throws a Refusal that names the input and the sizes.
QuartermapCpuScan map_sizes(std::vector<Input> const& inputs, std::int64_t directions);

// The same of a SelectiveScan, whose inputs are u, delta, A, B, C and, where they are there, D and delta_bias.
QuartermapCpuScan sequence_sizes(std::vector<Input> const& inputs);

// The sizes of a LayerNormalization2D.
QuartermapCpuNorm norm_sizes(Input const& x, Input const& scale, Input const& bias);

// Sizes as people write them, such as (1, 96, 56, 56).
std::string words(std::vector<std::int64_t> const& sizes);

} // namespace quartermap::onnxruntime
