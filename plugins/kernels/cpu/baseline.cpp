// The kernels for what every processor of the platform has: 4 channels at a time. On 64-bit ARM that is NEON.
#define QUARTERMAP_LANES 4
#include "kernels.h"

#include "instruction_sets.h"

namespace quartermap::cpu
{

#if defined(__aarch64__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
InstructionSet const baseline = QUARTERMAP_INSTRUCTION_SET("neon");
#else
InstructionSet const baseline = QUARTERMAP_INSTRUCTION_SET("baseline");
#endif

} // namespace quartermap::cpu
