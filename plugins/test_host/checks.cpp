#include "checks.h"

#include <cstdio>

namespace quartermap::host
{

namespace
{

int checks_made = 0;
int checks_failed = 0;

} // namespace

void check(bool passed, std::string const& what)
{
    ++checks_made;
    if (!passed)
    {
        ++checks_failed;
        std::printf("FAILED: %s\n", what.c_str());
    }
}

int checks()
{
    return checks_made;
}

int failures()
{
    return checks_failed;
}

} // namespace quartermap::host
