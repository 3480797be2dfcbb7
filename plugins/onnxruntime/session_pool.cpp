#include "session_pool.h"

#include "status.h"

namespace quartermap::onnxruntime
{

std::int32_t run_in_pool(void* given, QuartermapCpuTask task, void* argument, std::size_t count)
{
    Pool& pool = *static_cast<Pool*>(given);
    pool.status = pool.api->KernelContext_ParallelFor(pool.context, task, count, 0, argument);
    return pool.status != nullptr ? 1 : 0;
}

void check_call(Pool const& pool, std::int32_t status)
{
    check(pool.status);
    if (status != QUARTERMAP_CPU_SUCCESS)
    {
        throw Refusal{RUNTIME_EXCEPTION, quartermap_cpu_message(status)};
    }
}

} // namespace quartermap::onnxruntime
