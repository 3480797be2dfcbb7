#include "instruction_sets.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(QUARTERMAP_WITH_AVX)
#include <cpuid.h>
#endif

namespace quartermap::cpu
{
namespace
{

struct Candidate
{
    InstructionSet const* set;
    bool usable;
};

struct Candidates
{
    Candidate all[3]; // the widest first
    int count;
};

Candidates candidates()
{
#if defined(QUARTERMAP_WITH_AVX)
    __builtin_cpu_init();
    unsigned int eax = 0;
    unsigned int ebx = 0;
    unsigned int ecx = 0;
    unsigned int edx = 0;
    // Not every compiler knows "f16c" by name.
    bool const has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
    bool const has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
    bool const has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return {{{&avx512, has_avx512}, {&avx2, has_avx2}, {&baseline, true}}, 3};
#else
    return {{{&baseline, true}, {}, {}}, 1};
#endif
}

InstructionSet const* find(char const* name)
{
    Candidates const found = candidates();
    for (int i = 0; i < found.count; ++i)
    {
        Candidate const& candidate = found.all[i];
        if (candidate.usable && (name == nullptr || std::strcmp(name, candidate.set->name) == 0))
        {
            return candidate.set;
        }
    }
    return nullptr;
}

std::atomic<InstructionSet const*>& chosen()
{
    static std::atomic<InstructionSet const*> set{[]
        {
            char const* const wanted = std::getenv("QUARTERMAP_INSTRUCTION_SET");
            return find(wanted != nullptr && *wanted != '\0' ? wanted : nullptr);
        }()};
    return set;
}

} // namespace

InstructionSet const* chosen_instruction_set()
{
    return chosen().load();
}

bool choose_instruction_set(char const* name)
{
    InstructionSet const* const set = find(name);
    if (set != nullptr)
    {
        chosen().store(set);
    }
    return set != nullptr;
}

} // namespace quartermap::cpu
