// Memory for the time of one scan. Blocks are kept for the next one up to a bound, and given back above it.
#pragma once

#include <cstddef>

namespace quartermap::cpu
{

// Bytes that the process keeps between scans, at most.
constexpr std::size_t KEPT_BYTES = std::size_t{64} << 20;

// A block of floats on a cache line's boundary; its contents are anything. Empty where there is no memory.
class Scratch
{
public:
    explicit Scratch(std::size_t floats);
    ~Scratch();
    Scratch(Scratch const&) = delete;
    Scratch& operator=(Scratch const&) = delete;

    float* data() const
    {
        return mData;
    }

private:
    void* mBlock{nullptr};
    float* mData{nullptr};
};

} // namespace quartermap::cpu
