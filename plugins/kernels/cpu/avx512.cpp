// The kernels for AVX-512 (F, DQ, BW, VL): 16 channels at a time. Compiled with these instructions, so nothing here may run before
// `instruction_sets.cpp` has found that the processor has them.
#define QUARTERMAP_LANES 16
#include "kernels.h"

#include "instruction_sets.h"

namespace quartermap::cpu
{

InstructionSet const avx512 = QUARTERMAP_INSTRUCTION_SET("avx512");

} // namespace quartermap::cpu
