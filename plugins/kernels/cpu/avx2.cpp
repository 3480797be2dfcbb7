// The kernels for AVX2 with FMA and F16C: 8 channels at a time. Compiled with these instructions, so nothing here may run before
// `instruction_sets.cpp` has found that the processor has them.
#define QUARTERMAP_LANES 8
#include "kernels.h"

#include "instruction_sets.h"

namespace quartermap::cpu
{

InstructionSet const avx2 = QUARTERMAP_INSTRUCTION_SET("avx2");

} // namespace quartermap::cpu
