// The kernels with 16 channels at a time in the compiler's own vectors, so that what AVX-512 shares with the others runs
// on processors that lack it.
#define QUARTERMAP_LANES 16
#include "kernels.h"

#include "instruction_sets.h"

namespace quartermap::cpu
{

InstructionSet const baseline = QUARTERMAP_INSTRUCTION_SET("sixteen lanes");

} // namespace quartermap::cpu
