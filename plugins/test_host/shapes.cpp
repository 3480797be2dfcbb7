#include "shapes.h"

#include <algorithm>

namespace quartermap::host
{

using namespace nvinfer1;

std::vector<std::vector<std::int64_t>> shapes_of(Sizes const& s)
{
    std::int64_t const k = s.directions;
    std::vector<std::vector<std::int64_t>> shapes = {
        {s.batch, s.d_inner, s.height, s.width},
        {s.batch, k * (s.dt_rank > 0 ? s.dt_rank : s.d_inner), s.height, s.width},
        {s.batch, k * s.d_state, s.height, s.width},
        {s.batch, k * s.d_state, s.height, s.width},
        {k * s.d_inner, s.d_state},
        {k * s.d_inner},
        {k * s.d_inner},
    };
    if (s.dt_rank > 0)
    {
        shapes.push_back({k * s.d_inner, s.dt_rank});
    }
    return shapes;
}

bool is_parameter(std::size_t input)
{
    return input >= 4 && input <= 6;
}

DynamicPluginTensorDesc describe(std::vector<std::int64_t> const& shape, DataType type,
    TensorFormat format, std::int64_t batch)
{
    DynamicPluginTensorDesc result{};
    result.desc.dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), result.desc.dims.d);
    result.desc.type = type;
    result.desc.format = format;
    result.desc.scale = 1.0F;
    result.min = result.max = result.opt = result.desc.dims;
    if (batch >= 0 && shape.size() == 4) // a dynamic batch with this maximum
    {
        result.desc.dims.d[0] = -1;
        result.min.d[0] = 1;
        result.max.d[0] = result.opt.d[0] = batch;
    }
    return result;
}

} // namespace quartermap::host
