// What the kernels of this folder ask of a machine beyond device.h: products of small matrices by a warp, arithmetic on
// pairs of 16-bit values, shared memory by its address, and barriers that have names.
//
// On a device these are single instructions (device_machine.h). For tests they are emulation/emulated_machine.h, which
// also reports two accesses of shared memory between which no barrier stands, and leaves a barrier out when told its
// name.
#pragma once

#include <cstdint>

#include "device.h"
#include "element_types.h"

namespace quartermap
{
namespace tensor_core
{

// Two values of 16 bits, the first in the lower half.
using Word = std::uint32_t;

// An address in the shared memory of the block, in bytes.
using Shared = std::uint32_t;

// Why threads wait for each other; each names the accesses that it keeps apart.
enum class Barrier
{
    kMapsRead,        // the block: x has been read, before a warp uses it (where nothing is staged for the block)
    kMiddle,          // the block: one sense has summed up the first half of the map, before the other comes there
    kOrientationDone, // the block: the rows have been summed up, before the columns come there
    kDirectionStaged, // the block: dt, B and C of a direction are staged (and x has been read)
    kDirectionDone,   // the block: they have been read, before those of the next direction are staged
    kTaskStaged,      // a warp: its dt, B and C are staged
    kStageRead,       // a warp: it has read its time steps, before the maps of its segments are written over them
    kSegmentsWritten, // a team: the maps of all segments are there
    kStatesWritten,   // a team: so are the states before them
    kTaskDone,        // a warp: it has read its states and C, before it stages again
    kSumDone,         // the block: y is complete
    kRowsPacked,      // the block: its rows stand without padding
    kDirectionAdded,  // the block: it has taken the states of a direction, before segments of the next are told
    kAllFinite,       // the block: each thread says whether what it stored of y is finite
    kSumsKept,        // a warp: its sums in float32 are there, before the next are added, or they are stored
    kPredecessors,    // a lane: the blocks before this one have told their maps
    kCount
};

QUARTERMAP_INLINE constexpr Word twice(Word half)
{
    return half | half << 16;
}

} // namespace tensor_core
} // namespace quartermap

#if defined(__CUDACC__)
#include "device_machine.h"
#else
#include "emulated_machine.h"
#endif
