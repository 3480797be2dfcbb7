// Which kernels this library has, and which of them this processor can run.
#pragma once

#include "job.h"

// Names of all that this library was built with, as a JSON list.
#if defined(QUARTERMAP_WITH_AVX)
#define QUARTERMAP_BUILT_SETS "[\"avx512\", \"avx2\", \"baseline\"]"
#elif defined(__aarch64__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
#define QUARTERMAP_BUILT_SETS "[\"neon\"]"
#else
#define QUARTERMAP_BUILT_SETS "[\"baseline\"]"
#endif

namespace quartermap::cpu
{

extern InstructionSet const baseline;
#if defined(QUARTERMAP_WITH_AVX)
extern InstructionSet const avx2;
extern InstructionSet const avx512;
#endif

// The one that is used now, or null if another was asked for that cannot be had.
InstructionSet const* chosen_instruction_set();

// Chooses one by name, or the widest for null. False if there is none of that name, or the processor lacks it.
bool choose_instruction_set(char const* name);

} // namespace quartermap::cpu
