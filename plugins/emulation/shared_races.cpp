#include "shared_races.h"

#include <algorithm>
#include <cstring>

namespace quartermap
{
namespace emulation
{

SharedRaces::SharedRaces(int threads, std::size_t bytes)
    : warps_((threads + 31) / 32)
    , clocks_(static_cast<std::size_t>(warps_), std::vector<std::uint32_t>(static_cast<std::size_t>(warps_), 0))
    , narrow_(static_cast<std::size_t>(warps_), 0)
    , writes_(bytes / 2 + 1)
    , reads_((bytes / 2 + 1) * static_cast<std::size_t>(warps_))
{
}

void SharedRaces::meet(std::vector<int> const& warps)
{
    std::vector<std::uint32_t> all(static_cast<std::size_t>(warps_), 0);
    for (int const w : warps)
    {
        auto& own = clocks_[static_cast<std::size_t>(w)];
        ++own[static_cast<std::size_t>(w)];
        std::transform(all.begin(), all.end(), own.begin(), all.begin(),
            [](std::uint32_t a, std::uint32_t b) { return std::max(a, b); });
    }
    for (int const w : warps)
    {
        clocks_[static_cast<std::size_t>(w)] = all;
        ++narrow_[static_cast<std::size_t>(w)];
    }
}

void SharedRaces::meet(int warp)
{
    ++narrow_[static_cast<std::size_t>(warp)];
}

bool SharedRaces::ordered(Access const& earlier, int warp_of_earlier, int thread) const
{
    auto const warp = static_cast<std::size_t>(thread / 32);
    if (earlier.thread == kNobody || earlier.thread == thread)
    {
        return true;
    }
    if (warp_of_earlier == thread / 32)
    {
        return narrow_[warp] > earlier.narrow;
    }
    return clocks_[warp][static_cast<std::size_t>(warp_of_earlier)] > earlier.wide;
}

void SharedRaces::report(char const* what, int thread, int other, std::uint32_t at)
{
    if (found_.empty())
    {
        found_ = "thread " + std::to_string(thread) + " " + what + " byte " + std::to_string(at)
            + " of shared memory with no barrier after "
            + (other == kSeveral ? std::string("several threads") : "thread " + std::to_string(other));
    }
}

void SharedRaces::read(int thread, std::uint32_t at, std::uint32_t size)
{
    auto const warp = static_cast<std::size_t>(thread / 32);
    for (std::uint32_t place = at / 2; place < (at + size) / 2; ++place)
    {
        Access const& write = writes_[place];
        if (!ordered(write, write.thread / 32, thread))
        {
            report("reads", thread, write.thread, 2 * place);
        }
        Access& own = reads_[place * static_cast<std::size_t>(warps_) + warp];
        bool const together = own.thread != kNobody && own.thread != thread && own.narrow == narrow_[warp];
        own = {together ? kSeveral : thread, clocks_[warp][warp], narrow_[warp], 0};
    }
}

void SharedRaces::write(int thread, std::uint32_t at, std::uint32_t size, unsigned char const* values)
{
    auto const warp = static_cast<std::size_t>(thread / 32);
    for (std::uint32_t place = at / 2; place < (at + size) / 2; ++place)
    {
        std::uint16_t value;
        std::memcpy(&value, values + (2 * place - at), sizeof value);
        Access& last = writes_[place];
        bool const same = last.thread / 32 == thread / 32 && last.value == value;
        if (!same && !ordered(last, last.thread / 32, thread))
        {
            report("writes", thread, last.thread, 2 * place);
        }
        for (int w = 0; w < warps_; ++w)
        {
            Access const& read = reads_[place * static_cast<std::size_t>(warps_) + static_cast<std::size_t>(w)];
            if (!ordered(read, w, thread))
            {
                report("writes", thread, read.thread, 2 * place);
            }
        }
        last = {thread, clocks_[warp][warp], narrow_[warp], value};
    }
}

} // namespace emulation
} // namespace quartermap
