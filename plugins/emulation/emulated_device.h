// Thread blocks on the host, for tests: the kernels are compiled as they are, by a C++ compiler alone.
//
// Every CUDA thread is a fibre. A fibre runs until it meets a barrier or an exchange of its warp, and goes on when all
// others have arrived, so that a wrong index, a missing barrier or a barrier that not all threads meet shows as it
// would on a device, but at every run: shared memory starts as NaN, and the fibres take turns in an order that a test
// can change (`quartermap_emulation_order`), which changes the result where a barrier is missing. Kernels that reach
// shared memory by its address are watched beyond that (shared_races.h), and a test can leave out any of their
// barriers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define QUARTERMAP_DEVICE inline
#define QUARTERMAP_KERNEL(threads, blocks) inline
#define QUARTERMAP_UNROLL
#define QUARTERMAP_UNROLL_BY_4
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

// What a lane hands to the others of its warp.
struct Words
{
    std::uint32_t values[6];
};

// Of the fibre that runs.
extern Identity current;

void wait_for_block();
void wait_for_warp();
// For `threads` threads, whole warps, that name the same number.
void wait_for_team(int number, int threads);
// Waits for the block; whether any of its threads said so. Without waiting, what was said so far.
bool vote(bool so, bool wait);
// Lets the others go on, in a loop that waits for another block.
void pause();
// Gives every lane of a warp what all 32 lanes hand over. Orders no memory.
Words const* exchange(Words const& words);

// Bytes of shared memory, watched for races; outside of it, or at an address that is no multiple of the size, the run
// fails. Good until the fibre waits.
char const* read_shared(std::uint32_t at, std::uint32_t size);
void write_shared(std::uint32_t at, std::uint32_t size, unsigned char const* values);

// Ends the run as failed, after the fibre's block, if something is not so.
void require(bool so, char const* words);

// Whether a test has left out the barrier of this number.
bool left_out(int barrier);

// Runs `blocks` blocks, some at a time; `body` is what each thread does. False, with the reason on stderr, if threads
// wait for each other for ever, if one does what it may not, or if two race. Only one run at a time.
bool run(std::function<void()> const& body, unsigned blocks, int threads, std::int64_t shared_bytes);

inline Words words_of(float value)
{
    Words words{};
    std::memcpy(words.values, &value, sizeof value);
    return words;
}

inline float float_in(Words const& words)
{
    float value;
    std::memcpy(&value, words.values, sizeof value);
    return value;
}

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
    emulation::Words const* const lanes = emulation::exchange(emulation::words_of(value));
    return lane % width >= distance ? emulation::float_in(lanes[lane - distance]) : value;
}

inline float from_lane(float value, int from, int width)
{
    int const lane = thread_index() % 32;
    return emulation::float_in(emulation::exchange(emulation::words_of(value))[lane - lane % width + from]);
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
