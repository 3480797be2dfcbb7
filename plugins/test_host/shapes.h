// The shapes of the operator's inputs, and their descriptions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "interface.h"

namespace quartermap::host
{

struct Sizes
{
    std::int64_t batch, d_inner, height, width, d_state, dt_rank, directions;
};

// Of the inputs, in their order.
std::vector<std::vector<std::int64_t>> shapes_of(Sizes const& sizes);

// Whether an input is float32, whatever x is.
bool is_parameter(std::size_t input);

// With a `batch` the batch is dynamic, up to that.
nvinfer1::DynamicPluginTensorDesc describe(std::vector<std::int64_t> const& shape, nvinfer1::DataType type,
    nvinfer1::TensorFormat format = nvinfer1::TensorFormat::kLINEAR, std::int64_t batch = -2);

} // namespace quartermap::host
