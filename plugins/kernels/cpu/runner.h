// Runs the tasks of one call on the threads that there are for it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "denormals.h"
#include "quartermap/cpu_scan.h"
#include "threads.h"

namespace quartermap::cpu
{

class Runner
{
public:
    Runner(QuartermapCpuParallel parallel, void* pool, std::size_t threads)
        : mParallel(parallel)
        , mPool(pool)
        , mThreads(threads)
    {
    }

    // Calls function(i) for every i < count; a function says whether it had the memory that it needs.
    template <typename Function>
    std::int32_t each(std::size_t count, Function const& function) const
    {
        struct Call
        {
            Function const& function;
            std::atomic<bool> failed{false};
        } call{function};
        QuartermapCpuTask const task = [](void* argument, std::size_t index)
        {
            DenormalsAreZero const guard;
            Call& all = *static_cast<Call*>(argument);
            if (!all.function(index))
            {
                all.failed = true;
            }
        };
        if (mThreads == 1 || count == 1)
        {
            for (std::size_t i = 0; i < count; ++i)
            {
                task(&call, i);
            }
        }
        else if (mParallel == nullptr)
        {
            run_tasks(mThreads, task, &call, count);
        }
        else if (mParallel(mPool, task, &call, count) != 0)
        {
            return QUARTERMAP_CPU_NOT_RUN;
        }
        return call.failed ? QUARTERMAP_CPU_OUT_OF_MEMORY : QUARTERMAP_CPU_SUCCESS;
    }

private:
    QuartermapCpuParallel mParallel;
    void* mPool;
    std::size_t mThreads;
};

} // namespace quartermap::cpu
