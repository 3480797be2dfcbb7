#include "division.h"

#include <algorithm>

namespace quartermap::cpu
{
namespace
{

// What directions apart cost beside scanning a tile as a whole: maps are written and read once more for each.
constexpr double APART_COST = 1.07;
// What the first pass over a segment costs, which wants the state alone, beside the second.
constexpr double FIRST_PASS_COST = 0.85;
constexpr std::size_t MOST_SEGMENTS = 32;
constexpr std::size_t SHORTEST_SEGMENT = 8 * BLOCK;
// Floats that directions apart may take: 256 MiB.
constexpr std::size_t MOST_SHARED_FLOATS = std::size_t{64} << 20;

std::size_t rounds(std::size_t tasks, std::size_t threads)
{
    return (tasks + threads - 1) / threads;
}

} // namespace

std::size_t tiles_of_group(Job const& job, std::size_t lanes)
{
    return (job.channels + lanes - 1) / lanes;
}

std::size_t shared_floats(Job const& job, std::size_t lanes, Division const& division)
{
    if (!division.apart)
    {
        return 0;
    }
    std::size_t const tiles = job.images * job.groups * tiles_of_group(job, lanes);
    std::size_t const maps = 1 + job.directions * (job.rank == 0 ? 2 : 1);
    std::size_t const carried = job.directions * division.segments * (2 * job.states + 2) * lanes;
    return tiles * (maps * (job.positions + 1) * lanes + carried);
}

Division divide(Job const& job, std::size_t lanes, std::size_t threads)
{
    std::size_t const tiles = job.images * job.groups * tiles_of_group(job, lanes);
    std::size_t const parts = tiles * job.directions;
    Division best{false, 1, job.padded};
    if (threads < 2)
    {
        return best;
    }
    // The time of all tasks, in units of one direction of one tile.
    double least = static_cast<double>(rounds(tiles, threads) * job.directions);
    std::size_t const longest = std::min(MOST_SEGMENTS, std::max<std::size_t>(1, job.positions / SHORTEST_SEGMENT));
    for (std::size_t wanted = 1; wanted <= longest; ++wanted)
    {
        std::size_t const blocks = (job.padded / BLOCK + wanted - 1) / wanted;
        Division const division{true, (job.padded / BLOCK + blocks - 1) / blocks, blocks * BLOCK};
        std::size_t const segments = division.segments;
        double const first_pass
            = segments == 1 ? 0.0 : FIRST_PASS_COST * static_cast<double>(rounds(parts * (segments - 1), threads));
        double const second_pass = static_cast<double>(rounds(parts * segments, threads));
        double const time = APART_COST * (first_pass + second_pass) / static_cast<double>(segments);
        if (time < least && shared_floats(job, lanes, division) <= MOST_SHARED_FLOATS)
        {
            least = time;
            best = division;
        }
    }
    return best;
}

} // namespace quartermap::cpu
