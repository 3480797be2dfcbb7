// How a scan is divided among threads.
#pragma once

#include "job.h"

namespace quartermap::cpu
{

struct Division
{
    bool apart;           // whether every direction of a tile is a task of its own
    std::size_t segments; // of each direction; 1 or more, and 1 if not apart
    std::size_t segment;  // positions of one, whole blocks
};

// Tiles of channels of one group.
std::size_t tiles_of_group(Job const& job, std::size_t lanes);

// Floats of scratch memory that all tasks of such a division share.
std::size_t shared_floats(Job const& job, std::size_t lanes, Division const& division);

// The fastest division for this many threads. Directions apart give the same result to the last bit; segments differ by
// rounding.
Division divide(Job const& job, std::size_t lanes, std::size_t threads);

} // namespace quartermap::cpu
