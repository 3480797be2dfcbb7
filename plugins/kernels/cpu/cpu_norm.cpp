#include "quartermap/cpu_norm.h"

#include <algorithm>

#include "instruction_sets.h"
#include "norm_job.h"
#include "runner.h"
#include "threads.h"

namespace quartermap::cpu
{
namespace
{

constexpr std::int64_t MOST_ELEMENTS = std::int64_t{1} << 40;
// Vectors of positions that are fastest together.
constexpr std::size_t VECTORS = 8;
// Elements below which threads cost more than they bring.
constexpr std::size_t WORTH_THREADS = std::size_t{1} << 14;

bool too_large(QuartermapCpuNorm const& norm)
{
    return norm.channels > MOST_ELEMENTS / std::max<std::int64_t>(1, norm.positions)
        || norm.batch > MOST_ELEMENTS / std::max<std::int64_t>(1, norm.channels * norm.positions);
}

// Positions of a task: whole strips of vectors, and fewer vectors where there would be too few tasks to share out evenly.
std::size_t positions_of_a_task(
    std::size_t images, std::size_t positions, std::size_t lanes, std::size_t threads)
{
    std::size_t vectors = VECTORS;
    while (vectors > 1 && images * ((positions + vectors * lanes - 1) / (vectors * lanes)) < 4 * threads)
    {
        vectors /= 2;
    }
    return vectors * lanes;
}

} // namespace
} // namespace quartermap::cpu

using namespace quartermap::cpu;

int32_t quartermap_cpu_norm(QuartermapCpuNorm const* norm, QuartermapCpuParallel parallel, void* pool)
{
    if (norm == nullptr)
    {
        return QUARTERMAP_CPU_NULL_POINTER;
    }
    if (norm->batch < 0 || norm->channels < 0 || norm->positions < 0 || norm->threads < 0 || !(norm->epsilon > 0.0F))
    {
        return QUARTERMAP_CPU_BAD_SIZE;
    }
    if (too_large(*norm))
    {
        return QUARTERMAP_CPU_TOO_LARGE;
    }
    InstructionSet const* const set = chosen_instruction_set();
    if (set == nullptr)
    {
        return QUARTERMAP_CPU_NO_SUCH_INSTRUCTION_SET;
    }
    if (norm->batch == 0 || norm->channels == 0 || norm->positions == 0)
    {
        return QUARTERMAP_CPU_SUCCESS;
    }
    if (norm->x == nullptr || norm->scale == nullptr || norm->bias == nullptr || norm->y == nullptr)
    {
        return QUARTERMAP_CPU_NULL_POINTER;
    }
    NormJob const job{static_cast<std::size_t>(norm->channels), static_cast<std::size_t>(norm->positions), norm->epsilon,
        norm->x, norm->scale, norm->bias, norm->y};
    std::size_t const images = static_cast<std::size_t>(norm->batch);
    std::size_t const wanted = norm->threads > 0 ? static_cast<std::size_t>(norm->threads) : usable_cores();
    std::size_t const threads = images * job.channels * job.positions < WORTH_THREADS ? 1 : wanted;
    std::size_t const size = positions_of_a_task(images, job.positions, set->lanes, threads);
    std::size_t const tasks = (job.positions + size - 1) / size;
    return Runner(parallel, pool, threads)
        .each(images * tasks,
            [&](std::size_t i)
            {
                std::size_t const begin = i % tasks * size;
                set->normalize(job, i / tasks, begin, std::min(begin + size, job.positions));
                return true;
            });
}
