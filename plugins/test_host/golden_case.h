// One case of write_golden.py: a line of text, then the tensors as they lie in memory, then y in float64.
//   NAME type softplus tolerance batch d_inner H W N R K direction...
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "shapes.h"

namespace quartermap::host
{

struct Case
{
    std::string name;
    std::string type;
    int softplus = 0;
    double tolerance = 0;
    Sizes sizes{};
    std::string directions;
    std::vector<std::vector<char>> inputs;
    std::vector<double> expected;
};

bool read_case(std::string const& path, Case& result);

// Bytes of a number, by the name of its type.
std::size_t width_of(std::string const& type);

// The number at a place.
double value_of(std::vector<char> const& bytes, std::size_t i, std::string const& type);

} // namespace quartermap::host
