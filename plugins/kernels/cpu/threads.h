// How tasks are run: by the caller's pool, or on threads that end with the call.
#pragma once

#include <cstddef>

#include "quartermap/cpu_scan.h"

namespace quartermap::cpu
{

// As many as the process may use at once.
std::size_t usable_cores();

// Runs tasks on up to `threads` threads, the caller's among them. Threads that cannot be had are done without.
void run_tasks(std::size_t threads, QuartermapCpuTask task, void* argument, std::size_t count);

// Runs tasks on a team of an OpenMP runtime.
void run_tasks(QuartermapCpuTeam const& team, QuartermapCpuTask task, void* argument, std::size_t count);

} // namespace quartermap::cpu
