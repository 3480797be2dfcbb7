#include "threads.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace quartermap::cpu
{
namespace
{

// Threads of one scan, at most, whatever is asked for.
constexpr std::size_t MOST_THREADS = 1024;

// Tasks that several threads take from, one after the other.
struct Shared
{
    QuartermapCpuTask task;
    void* argument;
    std::size_t count;
    std::atomic<std::size_t> next{0};

    void work()
    {
        for (std::size_t i = next++; i < count; i = next++)
        {
            task(argument, i);
        }
    }
};

} // namespace

std::size_t usable_cores()
{
    static std::size_t const cores = std::max(1U, std::thread::hardware_concurrency());
    return cores;
}

void run_tasks(std::size_t threads, QuartermapCpuTask task, void* argument, std::size_t count)
{
    Shared shared{task, argument, count};
    auto const work = [&shared] { shared.work(); };
    std::size_t const workers = std::min({threads, count, MOST_THREADS});
    std::size_t const helpers = workers > 1 ? workers - 1 : 0;
    std::vector<std::thread> pool;
    try
    {
        pool.reserve(helpers);
        for (std::size_t i = 0; i < helpers; ++i)
        {
            pool.emplace_back(work);
        }
    }
    catch (std::exception const&)
    {
        // Too many threads or too little memory: those that have started, and this one, do everything.
    }
    work();
    for (std::thread& thread : pool)
    {
        thread.join();
    }
}

void run_tasks(QuartermapCpuTeam const& team, QuartermapCpuTask task, void* argument, std::size_t count)
{
    Shared shared{task, argument, count};
    auto const member = [](void* given) { static_cast<Shared*>(given)->work(); };
    team.start(member, &shared, static_cast<unsigned int>(std::min<std::size_t>({team.threads, count, MOST_THREADS})), 0);
}

} // namespace quartermap::cpu
