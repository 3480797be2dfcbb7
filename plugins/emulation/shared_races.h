// Finds two accesses of shared memory, at least one of them a write, by two threads between which no barrier stands: in
// whatever order the threads take turns, so that one run shows what a device would show one time in a thousand.
//
// What a barrier orders is kept for warps: an access of warp v has happened before what warp w does now if w has met,
// directly or through others, a barrier that v met after it. Within a warp the same holds with barriers of the warp
// too. Exchanges between the lanes of a warp (products, shuffles) order no memory, and are no barriers here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quartermap
{
namespace emulation
{

class SharedRaces
{
public:
    SharedRaces(int threads, std::size_t bytes);

    // Whole warps meet at a barrier of the block or of a team.
    void meet(std::vector<int> const& warps);
    // The lanes of a warp meet.
    void meet(int warp);

    // Of `size` bytes, two or more, by one thread. The value decides whether two lanes of a warp that write to one
    // place do any harm; CUDA lets one of them win.
    void read(int thread, std::uint32_t at, std::uint32_t size);
    void write(int thread, std::uint32_t at, std::uint32_t size, unsigned char const* values);

    // What was found first; empty if nothing was.
    std::string const& found() const
    {
        return found_;
    }

private:
    struct Access
    {
        int thread = kNobody;
        std::uint32_t wide = 0;   // the warp's count of barriers with other warps
        std::uint32_t narrow = 0; // and of all barriers
        std::uint16_t value = 0;
    };

    static constexpr int kNobody = -1;
    static constexpr int kSeveral = -2; // lanes of the warp

    bool ordered(Access const& earlier, int warp_of_earlier, int thread) const;
    void report(char const* what, int thread, int other, std::uint32_t at);

    int warps_;
    std::vector<std::vector<std::uint32_t>> clocks_; // of warp w: how many barriers of each warp it knows of
    std::vector<std::uint32_t> narrow_;
    std::vector<Access> writes_; // the last, for each place of two bytes
    std::vector<Access> reads_;  // the last, for each place and warp
    std::string found_;
};

} // namespace emulation
} // namespace quartermap
