// One scan, taken apart: what the kernels of every instruction set are given, and what each of them offers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "norm_job.h"

namespace quartermap::cpu
{

// Positions that a kernel takes at a time. Orders are padded to whole blocks with the position behind the last.
constexpr std::size_t BLOCK = 8;

// What happens to the output of one direction at a position.
enum class Output
{
    first, // becomes y, together with the skip connection
    added, // is added to y
    alone, // becomes y
    none   // is not wanted: the state alone is
};

// The scan of some images. All maps are row-major; L = H * W positions.
struct Job
{
    std::size_t images;
    std::size_t groups;     // G
    std::size_t channels;   // d
    std::size_t positions;  // L
    std::size_t directions; // K
    std::size_t states;     // N
    std::size_t rank;       // R; 0 where dt is the full map
    bool softplus;
    int element_type;

    void const* x;         // (images, G * d, L)
    void const* dt;        // (images, G * K * R, L) or (images, G * K * d, L)
    void const* B;         // (images, G * K * N, L)
    void const* C;         // the same
    float const* A;        // (G * K * d, N)
    float const* D;        // (G * K * d) or null
    float const* dt_bias;  // (G * K * d) or null
    void const* dt_weight; // (G * K * d, R)
    void* y;               // (images, G * d, L)

    std::int32_t const* orders; // (K, padded): the position that each direction meets at each step
    std::size_t padded;         // L rounded up to whole blocks
    float* packed;              // (images, G, K, L + 1, stride): R time steps, N of B and N of C of one position
    std::size_t stride;

    // Where directions are scanned apart, by tiles of channels; a tile is (L + 1, lanes).
    float* tiles_x;    // (tiles)
    float* tiles_dt;   // (tiles, K), where dt is the full map
    float* tiles_y;    // (tiles, K)
    float* carried;    // (tiles, K, segments, 2 N + 2, lanes): the states behind a segment, and the sum of its steps
    std::size_t segments;
    std::size_t segment; // positions of one, whole blocks
};

// The kernels of one instruction set. Every function does one task; none allocates.
struct InstructionSet
{
    char const* name;
    std::size_t lanes; // channels of a tile

    // Packs some positions of the narrow maps of one direction: image, group, direction, range of positions.
    void (*pack)(Job const& job, std::size_t map, std::size_t begin, std::size_t end);

    // Scans a tile of channels in all directions. `scratch` has `tile_floats` floats.
    std::size_t (*tile_floats)(Job const& job);
    void (*scan_tile)(Job const& job, std::size_t tile, float* scratch);

    // The same in parts, with every direction and segment a task of its own.
    void (*load_tile)(Job const& job, std::size_t tile, std::size_t part); // part 0: x; k + 1: dt of direction k
    std::size_t (*segment_floats)(Job const& job);
    void (*scan_segment)(Job const& job, std::size_t tile, std::size_t direction, std::size_t segment, bool last_pass,
        float* scratch);
    void (*merge_tile)(Job const& job, std::size_t tile, std::size_t begin, std::size_t end);

    // Normalises positions [begin, end) of an image over its channels.
    void (*normalize)(NormJob const& job, std::size_t image, std::size_t begin, std::size_t end);
};

} // namespace quartermap::cpu
