// The checks of the host, counted.
#pragma once

#include <string>

namespace quartermap::host
{

void check(bool passed, std::string const& what);

int checks();
int failures();

} // namespace quartermap::host
