// A thread block on the host, for tests: the kernels are compiled as they are, by a C++ compiler alone.
//
// Every CUDA thread is a fibre. A fibre runs until it meets a barrier of the block or an exchange of its warp, and goes on
// when all others have arrived, so that a wrong index, a missing barrier or a barrier that not all threads meet shows as
// it would on a device, but at every run: shared memory starts as NaN, and the fibres take turns in an order that a test
// can change (`quartermap_emulation_order`), which changes the result where a barrier is missing.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#define QUARTERMAP_INLINE inline
#define QUARTERMAP_DEVICE inline
#define QUARTERMAP_KERNEL(threads, blocks) inline
#define QUARTERMAP_UNROLL
#define QUARTERMAP_NO_UNROLL

namespace quartermap
{
namespace emulation
{

struct Identity
{
    int thread;
    int threads;
    unsigned block;
    char* shared;
};

// Of the fibre that runs.
extern Identity current;

void wait_for_block();
// Gives every lane of a warp the values of all 32 lanes.
float const* exchange(float value);

// Runs `blocks` blocks, one after the other; `body` is what each thread does. False if threads of a block wait for each
// other for ever. Only one run at a time.
bool run(std::function<void()> const& body, unsigned blocks, int threads, std::int64_t shared_bytes);

} // namespace emulation

inline int thread_index()
{
    return emulation::current.thread;
}

inline int thread_count()
{
    return emulation::current.threads;
}

inline unsigned block_index()
{
    return emulation::current.block;
}

inline char* shared_memory()
{
    return emulation::current.shared;
}

inline void wait_for_block()
{
    emulation::wait_for_block();
}

inline float from_earlier_lane(float value, int distance, int width)
{
    int const lane = thread_index() % 32;
    float const* values = emulation::exchange(value);
    return lane % width >= distance ? values[lane - distance] : value;
}

inline float from_lane(float value, int from, int width)
{
    int const lane = thread_index() % 32;
    return emulation::exchange(value)[lane - lane % width + from];
}

inline float power_of_two(float x)
{
    float const result = std::exp2(x);
    return result < 1.17549435e-38F ? 0.0F : result;
}

inline float reciprocal(float x)
{
    return 1.0F / x;
}

template <typename T>
inline T read_only(T const* where)
{
    return *where;
}

} // namespace quartermap
