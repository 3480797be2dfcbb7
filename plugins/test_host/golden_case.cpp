#include "golden_case.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <utility>

namespace quartermap::host
{

namespace
{

std::size_t volume(std::vector<std::int64_t> const& shape)
{
    std::size_t product = 1;
    for (std::int64_t const size : shape)
    {
        product *= static_cast<std::size_t>(size);
    }
    return product;
}

} // namespace

std::size_t width_of(std::string const& type)
{
    return type == "float32" ? 4 : 2;
}

bool read_case(std::string const& path, Case& result)
{
    std::ifstream file(path, std::ios::binary);
    file >> result.name >> result.type >> result.softplus >> result.tolerance >> result.sizes.batch
        >> result.sizes.d_inner >> result.sizes.height >> result.sizes.width >> result.sizes.d_state
        >> result.sizes.dt_rank >> result.sizes.directions >> result.directions;
    file.get();
    auto const shapes = shapes_of(result.sizes);
    for (std::size_t i = 0; file && i < shapes.size(); ++i)
    {
        std::vector<char> bytes(volume(shapes[i]) * (is_parameter(i) ? 4 : width_of(result.type)));
        file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        result.inputs.push_back(std::move(bytes));
    }
    result.expected.resize(volume(shapes[0]));
    file.read(reinterpret_cast<char*>(result.expected.data()),
        static_cast<std::streamsize>(result.expected.size() * sizeof(double)));
    return static_cast<bool>(file);
}

double value_of(std::vector<char> const& bytes, std::size_t i, std::string const& type)
{
    if (type == "float32")
    {
        float value;
        std::memcpy(&value, bytes.data() + i * 4, 4);
        return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + i * 2, 2);
    if (type == "bfloat16")
    {
        std::uint32_t const wide = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    int const exponent = (bits >> 10) & 31;
    double const fraction = (bits & 1023) / 1024.0;
    double const magnitude = exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
        : exponent == 0                     ? std::ldexp(fraction, -14)
                                            : std::ldexp(1 + fraction, exponent - 15);
    return bits & 0x8000 ? -magnitude : magnitude;
}

} // namespace quartermap::host
