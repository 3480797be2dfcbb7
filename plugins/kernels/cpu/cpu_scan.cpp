#include "quartermap/cpu_scan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "division.h"
#include "instruction_sets.h"
#include "runner.h"
#include "scratch.h"
#include "threads.h"

namespace quartermap::cpu
{
namespace
{

// Elements of a tensor, at most: their bytes can be counted, whatever is done with them.
constexpr std::uint64_t MOST_ELEMENTS = std::uint64_t{1} << 40;
constexpr std::int64_t MOST_POSITIONS = std::numeric_limits<std::int32_t>::max() - static_cast<std::int64_t>(BLOCK);
// Packed maps of several images at a time, at most; those of one image may be larger.
constexpr std::size_t MOST_PACKED_FLOATS = std::size_t{4} << 20;
constexpr std::size_t POSITIONS_OF_A_TASK = 1024;
// Below this many states and projections of one channel at one position threads cost more than they bring.
constexpr std::size_t WORTH_THREADS = std::size_t{1} << 18;

bool too_large(std::initializer_list<std::int64_t> sizes)
{
    std::uint64_t product = 1;
    for (std::int64_t const size : sizes)
    {
        if (size != 0 && product > MOST_ELEMENTS / static_cast<std::uint64_t>(size))
        {
            return true;
        }
        product *= static_cast<std::uint64_t>(size);
    }
    return false;
}

std::int32_t check_sizes(QuartermapCpuScan const& scan)
{
    if (scan.batch < 0 || scan.groups < 1 || scan.channels < 0 || scan.height < 0 || scan.width < 0
        || scan.d_state < 1 || scan.dt_rank < 0 || scan.direction_count < 1 || scan.threads < 0)
    {
        return QUARTERMAP_CPU_BAD_SIZE;
    }
    if (too_large({scan.height, scan.width}) || scan.height * scan.width > MOST_POSITIONS)
    {
        return QUARTERMAP_CPU_TOO_LARGE;
    }
    std::int64_t const narrow = std::max(scan.dt_rank, scan.d_state);
    std::int64_t const directions = scan.direction_count;
    bool const large = too_large({scan.batch, scan.groups, directions, narrow, scan.height, scan.width})
        || too_large({scan.batch, scan.groups, directions, scan.channels, scan.height, scan.width})
        || too_large({scan.groups, directions, scan.channels, narrow});
    return large ? QUARTERMAP_CPU_TOO_LARGE : QUARTERMAP_CPU_SUCCESS;
}

std::int32_t check(QuartermapCpuScan const* scan, QuartermapCpuTensors const* tensors)
{
    if (scan == nullptr || tensors == nullptr)
    {
        return QUARTERMAP_CPU_NULL_POINTER;
    }
    if (std::int32_t const status = check_sizes(*scan); status != QUARTERMAP_CPU_SUCCESS)
    {
        return status;
    }
    if (scan->directions == nullptr)
    {
        return QUARTERMAP_CPU_NULL_POINTER;
    }
    for (std::int32_t k = 0; k < scan->direction_count; ++k)
    {
        if (scan->directions[k] < QUARTERMAP_CPU_ROW || scan->directions[k] > QUARTERMAP_CPU_COLUMN_REVERSE)
        {
            return QUARTERMAP_CPU_BAD_DIRECTION;
        }
    }
    if (scan->element_type < QUARTERMAP_CPU_FLOAT32 || scan->element_type > QUARTERMAP_CPU_FLOAT64)
    {
        return QUARTERMAP_CPU_BAD_ELEMENT_TYPE;
    }
    return QUARTERMAP_CPU_SUCCESS;
}

bool pointers_missing(QuartermapCpuScan const& scan, QuartermapCpuTensors const& tensors)
{
    return tensors.x == nullptr || tensors.dt == nullptr || tensors.B == nullptr || tensors.C == nullptr
        || tensors.A == nullptr || tensors.y == nullptr || (tensors.dt_weight == nullptr) != (scan.dt_rank == 0);
}

// The positions of a map in the order of a direction; behind them, up to whole blocks, the position after the last.
void write_order(std::int32_t direction, std::int32_t height, std::int32_t width, std::size_t padded, std::int32_t* order)
{
    std::int32_t const positions = height * width;
    std::int32_t* next = order;
    if (direction == QUARTERMAP_CPU_COLUMN || direction == QUARTERMAP_CPU_COLUMN_REVERSE)
    {
        for (std::int32_t column = 0; column < width; ++column)
        {
            for (std::int32_t row = 0; row < height; ++row)
            {
                *next++ = row * width + column;
            }
        }
    }
    else
    {
        for (std::int32_t position = 0; position < positions; ++position)
        {
            *next++ = position;
        }
    }
    if (direction >= QUARTERMAP_CPU_ROW_REVERSE)
    {
        std::reverse(order, next);
    }
    std::fill(next, order + padded, positions);
}

Job job_of(QuartermapCpuScan const& scan, QuartermapCpuTensors const& tensors)
{
    Job job{};
    job.images = static_cast<std::size_t>(scan.batch);
    job.groups = static_cast<std::size_t>(scan.groups);
    job.channels = static_cast<std::size_t>(scan.channels);
    job.positions = static_cast<std::size_t>(scan.height * scan.width);
    job.directions = static_cast<std::size_t>(scan.direction_count);
    job.states = static_cast<std::size_t>(scan.d_state);
    job.rank = static_cast<std::size_t>(scan.dt_rank);
    job.softplus = scan.softplus != 0;
    job.element_type = scan.element_type;
    job.x = tensors.x;
    job.dt = tensors.dt;
    job.B = tensors.B;
    job.C = tensors.C;
    job.A = tensors.A;
    job.D = tensors.D;
    job.dt_bias = tensors.dt_bias;
    job.dt_weight = tensors.dt_weight;
    job.y = tensors.y;
    job.padded = (job.positions + BLOCK - 1) / BLOCK * BLOCK;
    job.stride = (job.rank + 2 * job.states + 3) / 4 * 4;
    return job;
}

// Of some images of a job, those from `first` on.
Job part_of(Job const& whole, std::size_t first, std::size_t images)
{
    constexpr std::size_t BYTES[] = {4, 2, 2, 8};
    std::size_t const bytes = BYTES[whole.element_type] * first * whole.groups * whole.positions;
    std::size_t const narrow = bytes * whole.directions * whole.states;
    std::size_t const steps = bytes * whole.directions * (whole.rank == 0 ? whole.channels : whole.rank);
    Job job = whole;
    job.images = images;
    job.x = static_cast<char const*>(whole.x) + bytes * whole.channels;
    job.y = static_cast<char*>(whole.y) + bytes * whole.channels;
    job.dt = static_cast<char const*>(whole.dt) + steps;
    job.B = static_cast<char const*>(whole.B) + narrow;
    job.C = static_cast<char const*>(whole.C) + narrow;
    return job;
}

std::int32_t pack_maps(InstructionSet const& set, Job const& job, Runner const& runner)
{
    std::size_t const ranges = (job.positions + POSITIONS_OF_A_TASK - 1) / POSITIONS_OF_A_TASK;
    return runner.each(job.images * job.groups * job.directions * ranges,
        [&](std::size_t i)
        {
            std::size_t const begin = i % ranges * POSITIONS_OF_A_TASK;
            set.pack(job, i / ranges, begin, std::min(begin + POSITIONS_OF_A_TASK, job.positions));
            return true;
        });
}

std::int32_t scan_whole_tiles(InstructionSet const& set, Job const& job, std::size_t tiles, Runner const& runner)
{
    return runner.each(tiles,
        [&](std::size_t i)
        {
            Scratch const scratch(set.tile_floats(job));
            if (scratch.data() == nullptr)
            {
                return false;
            }
            set.scan_tile(job, i, scratch.data());
            return true;
        });
}

std::int32_t scan_segments(
    InstructionSet const& set, Job const& job, std::size_t tiles, bool last_pass, Runner const& runner)
{
    // The state behind the last segment is wanted by nobody.
    std::size_t const segments = last_pass ? job.segments : job.segments - 1;
    return runner.each(tiles * job.directions * segments,
        [&](std::size_t i)
        {
            Scratch const scratch(set.segment_floats(job));
            if (scratch.data() == nullptr)
            {
                return false;
            }
            std::size_t const part = i / segments;
            set.scan_segment(
                job, part / job.directions, part % job.directions, i % segments, last_pass, scratch.data());
            return true;
        });
}

std::int32_t scan_apart(
    InstructionSet const& set, Job job, Division const& division, std::size_t tiles, Runner const& runner)
{
    Scratch const scratch(shared_floats(job, set.lanes, division));
    if (scratch.data() == nullptr)
    {
        return QUARTERMAP_CPU_OUT_OF_MEMORY;
    }
    std::size_t const map = tiles * (job.positions + 1) * set.lanes;
    std::size_t const full = job.rank == 0 ? job.directions : 0;
    job.segments = division.segments;
    job.segment = division.segment;
    job.tiles_x = scratch.data();
    job.tiles_dt = job.tiles_x + map;
    job.tiles_y = job.tiles_dt + full * map;
    job.carried = job.tiles_y + job.directions * map;
    std::int32_t status = runner.each(tiles * (1 + full),
        [&](std::size_t i)
        {
            set.load_tile(job, i / (1 + full), i % (1 + full));
            return true;
        });
    if (status == QUARTERMAP_CPU_SUCCESS && job.segments > 1)
    {
        status = scan_segments(set, job, tiles, false, runner);
    }
    if (status == QUARTERMAP_CPU_SUCCESS)
    {
        status = scan_segments(set, job, tiles, true, runner);
    }
    if (status != QUARTERMAP_CPU_SUCCESS)
    {
        return status;
    }
    std::size_t const ranges = (job.positions + POSITIONS_OF_A_TASK - 1) / POSITIONS_OF_A_TASK;
    return runner.each(tiles * ranges,
        [&](std::size_t i)
        {
            std::size_t const begin = i % ranges * POSITIONS_OF_A_TASK;
            set.merge_tile(job, i / ranges, begin, std::min(begin + POSITIONS_OF_A_TASK, job.positions));
            return true;
        });
}

std::int32_t run(InstructionSet const& set, QuartermapCpuScan const& scan, QuartermapCpuTensors const& tensors,
    QuartermapCpuParallel parallel, void* pool)
{
    Job whole = job_of(scan, tensors);
    std::size_t const packed = whole.groups * whole.directions * (whole.positions + 1) * whole.stride;
    std::size_t const images = std::max<std::size_t>(1, std::min(whole.images, MOST_PACKED_FLOATS / packed));
    Scratch const orders(whole.directions * whole.padded);
    Scratch const maps(images * packed);
    if (orders.data() == nullptr || maps.data() == nullptr)
    {
        return QUARTERMAP_CPU_OUT_OF_MEMORY;
    }
    // Integers where a Scratch has floats of the same size.
    std::int32_t* const order = reinterpret_cast<std::int32_t*>(orders.data());
    for (std::size_t k = 0; k < whole.directions; ++k)
    {
        write_order(scan.directions[k], static_cast<std::int32_t>(scan.height), static_cast<std::int32_t>(scan.width),
            whole.padded, order + k * whole.padded);
    }
    whole.orders = order;
    whole.packed = maps.data();

    std::size_t const work = images * whole.groups * whole.channels * whole.positions * whole.directions
        * (8 + whole.rank + 4 * whole.states);
    std::size_t const wanted = scan.threads > 0 ? static_cast<std::size_t>(scan.threads) : usable_cores();
    std::size_t const threads = work < WORTH_THREADS ? 1 : wanted;
    Runner const runner(parallel, pool, threads);
    for (std::size_t first = 0; first < whole.images; first += images)
    {
        Job const job = part_of(whole, first, std::min(images, whole.images - first));
        std::size_t const tiles = job.images * job.groups * tiles_of_group(job, set.lanes);
        std::int32_t status = pack_maps(set, job, runner);
        if (status == QUARTERMAP_CPU_SUCCESS)
        {
            Division const division = divide(job, set.lanes, threads);
            status = division.apart ? scan_apart(set, job, division, tiles, runner)
                                    : scan_whole_tiles(set, job, tiles, runner);
        }
        if (status != QUARTERMAP_CPU_SUCCESS)
        {
            return status;
        }
    }
    return QUARTERMAP_CPU_SUCCESS;
}

} // namespace
} // namespace quartermap::cpu

using namespace quartermap::cpu;

uint32_t quartermap_cpu_version(void)
{
    return QUARTERMAP_CPU_SCAN_VERSION;
}

char const* quartermap_cpu_message(int32_t status)
{
    switch (status)
    {
    case QUARTERMAP_CPU_SUCCESS: return "success";
    case QUARTERMAP_CPU_BAD_SIZE: return "a size is negative, or a scan without states, directions or groups is asked for";
    case QUARTERMAP_CPU_BAD_DIRECTION: return "a direction is unknown";
    case QUARTERMAP_CPU_BAD_ELEMENT_TYPE: return "the element type is unknown";
    case QUARTERMAP_CPU_TOO_LARGE: return "the scan is too large";
    case QUARTERMAP_CPU_NULL_POINTER: return "a tensor is missing, or dt_weight does not fit the rank of the time step";
    case QUARTERMAP_CPU_OUT_OF_MEMORY: return "there is not enough memory";
    case QUARTERMAP_CPU_NO_SUCH_INSTRUCTION_SET:
        return "the instruction set that was asked for is unknown, or this processor lacks it";
    case QUARTERMAP_CPU_NOT_RUN: return "the caller's threads could not run the scan";
    default: return "unknown status";
    }
}

char const* quartermap_cpu_instruction_set(void)
{
    InstructionSet const* const set = chosen_instruction_set();
    return set != nullptr ? set->name : "none";
}

int32_t quartermap_cpu_choose(char const* name)
{
    return choose_instruction_set(name) ? QUARTERMAP_CPU_SUCCESS : QUARTERMAP_CPU_NO_SUCH_INSTRUCTION_SET;
}

int32_t quartermap_cpu_by_team(void* team, QuartermapCpuTask task, void* argument, size_t count)
{
    auto const* const found = static_cast<QuartermapCpuTeam const*>(team);
    if (found == nullptr || found->start == nullptr || task == nullptr)
    {
        return QUARTERMAP_CPU_NULL_POINTER;
    }
    run_tasks(*found, task, argument, count);
    return QUARTERMAP_CPU_SUCCESS;
}

int32_t quartermap_cpu_scan(QuartermapCpuScan const* scan, QuartermapCpuTensors const* tensors,
    QuartermapCpuParallel parallel, void* pool)
{
    if (int32_t const status = check(scan, tensors); status != QUARTERMAP_CPU_SUCCESS)
    {
        return status;
    }
    InstructionSet const* const set = chosen_instruction_set();
    if (set == nullptr)
    {
        return QUARTERMAP_CPU_NO_SUCH_INSTRUCTION_SET;
    }
    if (scan->batch == 0 || scan->channels == 0 || scan->height * scan->width == 0)
    {
        return QUARTERMAP_CPU_SUCCESS;
    }
    if (pointers_missing(*scan, *tensors))
    {
        return QUARTERMAP_CPU_NULL_POINTER;
    }
    return run(*set, *scan, *tensors, parallel, pool);
}
