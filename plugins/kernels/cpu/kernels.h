// The kernels, written once for vectors of LANES channels. Each file of an instruction set includes them and makes its
// table of them.
//
// A tile is LANES neighbouring channels of one group of one image, as rows of LANES floats: one row for each position in
// raster order, and a last one of zeros at which padded steps look. Directions meet the same rows in different orders,
// so that a map is turned over twice, once on its way in and once on its way out, whatever the number of directions.
//
// Steps are taken in blocks. Everything that does not depend on the state before it (projection, softplus, dt * x) is
// done for a whole block; then the states, few at a time, run through the block in registers.
//
// A step is h += (a - 1) * h + dt * B * x where a is near 1, with the factor less 1 as the functions give it, and with what
// the sum has rounded away kept for the next step (Kahan). Where steps are small, a is near 1 and the same steps come again and again:
// a * h would round both in the same direction ten thousands of times, which at dt * |A| = 0.001 adds up to 5e-5.
#pragma once

#include <cfloat>

#include "channel_norm.h"
#include "element_rows.h"
#include "functions.h"
#include "job.h"

namespace
{

using quartermap::cpu::BLOCK;
using quartermap::cpu::Job;
using quartermap::cpu::Output;

// States that run through a block together: enough to hide the latency of one, and few enough for the registers.
constexpr std::size_t TOGETHER = 4;
// Positions whose time steps, and factors of a single state, are computed at once.
constexpr std::size_t ABREAST = 4;

std::size_t tiles_of_group(Job const& job)
{
    return (job.channels + LANES - 1) / LANES;
}

struct Tile
{
    std::size_t image;
    std::size_t group;
    std::size_t first; // channel of the group
    std::size_t count; // at most LANES

    Tile(Job const& job, std::size_t index)
        : image(index / (tiles_of_group(job) * job.groups))
        , group(index / tiles_of_group(job) % job.groups)
        , first(index % tiles_of_group(job) * LANES)
        , count(job.channels - first < LANES ? job.channels - first : LANES)
    {
    }

    // Of the tile's first channel among (G * K * d) parameters.
    std::size_t parameter(Job const& job, std::size_t direction) const
    {
        return (group * job.directions + direction) * job.channels + first;
    }

    // Of its first channel among the (images, G * d) rows of x and y.
    std::size_t row(Job const& job) const
    {
        return (image * job.groups + group) * job.channels + first;
    }
};

std::size_t map_floats(Job const& job)
{
    return (job.positions + 1) * LANES;
}

// Calls a function with a null pointer to the element type of a job.
template <typename Function>
QUARTERMAP_INLINED void with_type(int element_type, Function const& function)
{
    switch (element_type)
    {
    case 1:
        function(static_cast<Float16 const*>(nullptr));
        return;
    case 2:
        function(static_cast<BFloat16 const*>(nullptr));
        return;
    case 3:
        function(static_cast<double const*>(nullptr));
        return;
    default:
        function(static_cast<float const*>(nullptr));
        return;
    }
}

// `count` neighbouring rows of `length` elements, from row `first` on.
template <typename T>
QUARTERMAP_INLINED void point_at_rows(
    T const* (&rows)[LANES], void const* base, std::size_t first, std::size_t count, std::size_t length)
{
    for (std::size_t c = 0; c < count; ++c)
    {
        rows[c] = static_cast<T const*>(base) + (first + c) * length;
    }
}

void pack(Job const& job, std::size_t map, std::size_t begin, std::size_t end)
{
    std::size_t const total = job.rank + 2 * job.states;
    float* const out = job.packed + map * (job.positions + 1) * job.stride;
    with_type(job.element_type,
        [&](auto const* type)
        {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            for (std::size_t first = 0; first < job.stride; first += LANES)
            {
                T const* rows[LANES];
                std::size_t count = 0;
                for (std::size_t c = first; c < total && count < LANES; ++c, ++count)
                {
                    std::size_t const B = c - job.rank;
                    rows[count] = c < job.rank ? static_cast<T const*>(job.dt) + (map * job.rank + c) * job.positions
                        : B < job.states ? static_cast<T const*>(job.B) + (map * job.states + B) * job.positions
                                         : static_cast<T const*>(job.C)
                            + (map * job.states + B - job.states) * job.positions;
                }
                std::size_t const width = job.stride - first < LANES ? job.stride - first : LANES;
                gather_rows(rows, count, begin, end, out + first, job.stride, width);
            }
        });
    if (end == job.positions)
    {
        std::memset(out + job.positions * job.stride, 0, job.stride * sizeof(float));
    }
}

// (channels, L) of a map, from row `row` on, as the tile `out`.
void load_map(Job const& job, void const* map, std::size_t row, std::size_t count, float* out)
{
    with_type(job.element_type,
        [&](auto const* type)
        {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            T const* rows[LANES];
            point_at_rows(rows, map, row, count, job.positions);
            gather_rows(rows, count, 0, job.positions, out, LANES, LANES);
        });
    store(out + job.positions * LANES, spread(0.0F));
}

void load_x(Job const& job, Tile const& tile, float* out)
{
    load_map(job, job.x, tile.row(job), tile.count, out);
}

void load_dt(Job const& job, Tile const& tile, std::size_t direction, float* out)
{
    std::size_t const maps = (tile.image * job.groups + tile.group) * job.directions + direction;
    load_map(job, job.dt, maps * job.channels + tile.first, tile.count, out);
}

void store_y(Job const& job, Tile const& tile, float const* from, std::size_t begin, std::size_t end)
{
    with_type(job.element_type,
        [&](auto const* type)
        {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            T* const rows = static_cast<T*>(job.y) + tile.row(job) * job.positions;
            scatter_rows(from, begin, end, rows, job.positions, tile.count);
        });
}

// Below it A * log2(e) is no finite float.
constexpr float LEAST_A = -FLT_MAX / LOG2_E;

// The parameters of one direction for the channels of a tile, in rows of LANES: (R), then (N) of A times log2(e), then
// the least A of each TOGETHER states.
struct Parameters
{
    float* weight;
    float* A;
    float* least;
    Floats dt_bias;
    bool decays; // whether no factor exp(dt * A) can exceed 1

    static std::size_t floats(Job const& job)
    {
        return (job.rank + job.states + (job.states + TOGETHER - 1) / TOGETHER) * LANES;
    }

    Parameters(Job const& job, Tile const& tile, std::size_t direction, float* scratch)
        : weight(scratch)
        , A(scratch + job.rank * LANES)
        , least(A + job.states * LANES)
        , dt_bias(spread(0.0F))
        , decays(job.softplus)
    {
        std::size_t const first = tile.parameter(job, direction);
        with_type(job.element_type,
            [&](auto const* type)
            {
                using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
                T const* rows[LANES];
                point_at_rows(rows, job.dt_weight, first, tile.count, job.rank);
                gather_rows(rows, tile.count, 0, job.rank, weight, LANES, LANES);
            });
        float const* rows[LANES];
        point_at_rows(rows, job.A, first, tile.count, job.states);
        gather_rows(rows, tile.count, 0, job.states, A, LANES, LANES);
        for (std::size_t i = 0; i < job.states * LANES; ++i)
        {
            decays = decays && A[i] <= 0.0F;
            // In finite numbers: times a step of 0 it has to be 0.
            A[i] = A[i] < LEAST_A && A[i] >= -FLT_MAX ? -FLT_MAX : A[i] * LOG2_E;
            float& smallest = least[i / LANES / TOGETHER * LANES + i % LANES];
            smallest = i / LANES % TOGETHER == 0 || A[i] < smallest ? A[i] : smallest;
        }
        if (job.dt_bias != nullptr)
        {
            float values[LANES] = {};
            std::memcpy(values, job.dt_bias + first, tile.count * sizeof(float));
            dt_bias = load(values);
        }
    }
};

// The skip connection of a tile's channels: D, summed over the directions.
Floats skip_of(Job const& job, Tile const& tile)
{
    float sum[LANES] = {};
    for (std::size_t k = 0; k < job.directions && job.D != nullptr; ++k)
    {
        for (std::size_t c = 0; c < tile.count; ++c)
        {
            sum[c] += job.D[tile.parameter(job, k) + c];
        }
    }
    return load(sum);
}

// What the first direction's output becomes: without D nothing may be added, since 0 * x is not 0 for every x.
QUARTERMAP_INLINED Output first_output(Job const& job)
{
    return job.D != nullptr ? Output::first : Output::alone;
}

// One direction of one tile.
struct Direction
{
    float const* packed;       // (L + 1, stride)
    std::int32_t const* order; // (padded)
    float const* x;            // (L + 1, LANES)
    float const* dt;           // the same, where dt is the full map
    float* y;                  // the same
    Floats skip;
    Output output;
    float* state; // (2 N, LANES), in and out: the states, and what they have rounded away
    float* steps; // (2, LANES), or null: the sum of the steps, and what it has rounded away
};

// How large the steps of a block are.
enum class Steps
{
    small,   // SMALLEST_STEP <= dt * A * log2(e) <= 0
    bounded, // dt * A <= 0
    any
};

// The factors of some steps, given t = dt * A * log2(e): how much of a state stays as it is, all of it or nothing, and what
// the whole of it is multiplied by for the rest. All of it stays where a = exp(dt * A) is near 1, and the rest is a - 1; where
// a is small nothing does, and the rest is a: a large state that is all but forgotten must leave no rounding behind.
template <Steps STEPS, std::size_t COUNT>
struct Factors
{
    Floats growth[COUNT];
    Ints near[COUNT];

    explicit QUARTERMAP_INLINED Factors(Floats const (&t)[COUNT])
    {
        if constexpr (STEPS == Steps::small)
        {
            exp2_minus_one_of_small(t, growth);
        }
        else
        {
            exp2_near_one<STEPS == Steps::bounded>(t, growth, near);
        }
    }

    QUARTERMAP_INLINED Floats staying(Floats h, std::size_t i) const
    {
        return STEPS == Steps::small ? h : from_bits(bits(h) & near[i]);
    }
};

// `COUNT` states through one block.
template <std::size_t COUNT, Steps STEPS>
QUARTERMAP_INLINED void run_states(float const* const* rows, std::size_t at, std::size_t states, float const* A,
    float* state, Floats const* step, Floats const* input, Floats* sum)
{
    Floats h[COUNT];
    Floats rest[COUNT];
    for (std::size_t n = 0; n < COUNT; ++n)
    {
        h[n] = load(state + n * LANES);
        rest[n] = load(state + (states + n) * LANES);
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 1
#endif
    for (std::size_t j = 0; j < BLOCK; ++j)
    {
        float const* const B = rows[j] + at;
        float const* const C = B + states;
        // Two sums, so that a long chain of additions does not hold up the rest.
        Floats even = sum[j];
        Floats odd = spread(0.0F);
        Floats t[COUNT];
        for (std::size_t n = 0; n < COUNT; ++n)
        {
            t[n] = step[j] * load(A + n * LANES);
        }
        Factors<STEPS, COUNT> const factors(t);
        for (std::size_t n = 0; n < COUNT; ++n)
        {
            Floats const change = factors.growth[n] * h[n] + (input[j] * spread(B[n]) + rest[n]);
            Floats const staying = factors.staying(h[n], n);
            Floats const next = staying + change;
            rest[n] = change - (next - staying);
            h[n] = next;
            if (n % 2 == 0)
            {
                even = next * spread(C[n]) + even;
            }
            else
            {
                odd = next * spread(C[n]) + odd;
            }
        }
        sum[j] = even + odd;
    }
    for (std::size_t n = 0; n < COUNT; ++n)
    {
        store(state + n * LANES, h[n]);
        store(state + (states + n) * LANES, rest[n]);
    }
}

// The largest of the positive steps of a block, lane by lane.
QUARTERMAP_INLINED Floats largest_of(Floats const* step)
{
    Floats result = step[0];
    for (std::size_t j = 1; j < BLOCK; ++j)
    {
        result = larger(result, step[j]);
    }
    return result;
}

// Adds the steps of a block to a sum and to what it has rounded away, two rows.
QUARTERMAP_INLINED void add_steps(Floats const* step, float* sum)
{
    Floats change = load(sum + LANES);
    for (std::size_t j = 0; j < BLOCK; ++j)
    {
        change = change + step[j];
    }
    Floats const before = load(sum);
    Floats const after = before + change;
    store(sum, after);
    store(sum + LANES, change - (after - before));
}

// The same for a single state, whose steps wait for each other: all else is done for some of them at once, and what a sum
// has rounded away is added by the step after the next, since the next one would have to wait for it.
template <Steps STEPS>
QUARTERMAP_INLINED void run_state(float const* const* rows, std::size_t at, std::size_t states, float const* A,
    float* state, Floats const* step, Floats const* input, Floats* sum)
{
    Floats const a = load(A);
    Floats h = load(state);
    Floats rest = load(state + states * LANES); // of the step before the last
    Floats newest = spread(0.0F);               // of the last
    for (std::size_t first = 0; first < BLOCK; first += ABREAST)
    {
        Floats t[ABREAST];
        for (std::size_t j = 0; j < ABREAST; ++j)
        {
            t[j] = step[first + j] * a;
        }
        Factors<STEPS, ABREAST> const factors(t);
        for (std::size_t j = 0; j < ABREAST; ++j)
        {
            float const* const B = rows[first + j] + at;
            Floats const change = factors.growth[j] * h + (input[first + j] * spread(*B) + rest);
            Floats const staying = factors.staying(h, j);
            Floats const next = staying + change;
            rest = newest;
            newest = change - (next - staying);
            h = next;
            sum[first + j] = next * spread(B[states]) + sum[first + j];
        }
    }
    store(state, h);
    store(state + states * LANES, rest + newest);
}

// Steps [begin, end) of a direction, whole blocks.
template <bool SOFTPLUS, bool FULL, bool DECAYS>
void run_direction(
    Job const& job, Direction const& direction, Parameters const& parameters, std::size_t begin, std::size_t end)
{
    std::size_t const states = job.states;
    std::size_t const rank = FULL ? 0 : job.rank;
    for (std::size_t l = begin; l < end; l += BLOCK)
    {
        std::size_t at[BLOCK];
        float const* rows[BLOCK];
        Floats step[BLOCK];
        Floats input[BLOCK];
        Floats sum[BLOCK];
        for (std::size_t j = 0; j < BLOCK; ++j)
        {
            std::size_t const position = static_cast<std::size_t>(direction.order[l + j]);
            rows[j] = direction.packed + position * job.stride;
            at[j] = position * LANES;
            step[j] = FULL ? load(direction.dt + at[j]) + parameters.dt_bias : parameters.dt_bias;
            sum[j] = spread(0.0F);
        }
        for (std::size_t r = 0; r < rank; ++r)
        {
            Floats const weight = load(parameters.weight + r * LANES);
            for (std::size_t j = 0; j < BLOCK; ++j)
            {
                step[j] = weight * spread(rows[j][r]) + step[j];
            }
        }
        for (std::size_t first = 0; SOFTPLUS && first < BLOCK; first += ABREAST)
        {
            Floats v[ABREAST];
            for (std::size_t j = 0; j < ABREAST; ++j)
            {
                v[j] = step[first + j];
            }
            softplus(v);
            for (std::size_t j = 0; j < ABREAST; ++j)
            {
                step[first + j] = v[j];
            }
        }
        for (std::size_t j = 0; j < BLOCK; ++j)
        {
            input[j] = step[j] * load(direction.x + at[j]);
        }
        if (direction.steps != nullptr)
        {
            add_steps(step, direction.steps);
        }
        Floats const largest = DECAYS ? largest_of(step) : spread(0.0F);
        std::size_t n = 0;
        for (; n < states; n += n + TOGETHER <= states ? TOGETHER : 1)
        {
            constexpr Steps GENERAL = DECAYS ? Steps::bounded : Steps::any;
            float const* const A = parameters.A + n * LANES;
            float* const state = direction.state + n * LANES;
            bool const small
                = DECAYS && none_below(largest * load(parameters.least + n / TOGETHER * LANES), SMALLEST_STEP);
            if (n + TOGETHER <= states)
            {
                small ? run_states<TOGETHER, Steps::small>(rows, rank + n, states, A, state, step, input, sum)
                      : run_states<TOGETHER, GENERAL>(rows, rank + n, states, A, state, step, input, sum);
            }
            else
            {
                small ? run_state<Steps::small>(rows, rank + n, states, A, state, step, input, sum)
                      : run_state<GENERAL>(rows, rank + n, states, A, state, step, input, sum);
            }
        }
        for (std::size_t j = 0; j < BLOCK; ++j)
        {
            float* const y = direction.y + at[j];
            switch (direction.output)
            {
            case Output::first:
                store(y, direction.skip * load(direction.x + at[j]) + sum[j]);
                break;
            case Output::added:
                store(y, load(y) + sum[j]);
                break;
            case Output::alone:
                store(y, sum[j]);
                break;
            case Output::none:
                break;
            }
        }
    }
}

void run(Job const& job, Direction const& direction, Parameters const& parameters, std::size_t begin, std::size_t end)
{
    bool const full = job.rank == 0;
    if (!job.softplus)
    {
        full ? run_direction<false, true, false>(job, direction, parameters, begin, end)
             : run_direction<false, false, false>(job, direction, parameters, begin, end);
    }
    else if (!parameters.decays)
    {
        full ? run_direction<true, true, false>(job, direction, parameters, begin, end)
             : run_direction<true, false, false>(job, direction, parameters, begin, end);
    }
    else
    {
        full ? run_direction<true, true, true>(job, direction, parameters, begin, end)
             : run_direction<true, false, true>(job, direction, parameters, begin, end);
    }
}

float const* packed_of(Job const& job, Tile const& tile, std::size_t direction)
{
    std::size_t const map = (tile.image * job.groups + tile.group) * job.directions + direction;
    return job.packed + map * (job.positions + 1) * job.stride;
}

void clear(float* to, std::size_t rows)
{
    std::memset(to, 0, rows * LANES * sizeof(float));
}

std::size_t tile_floats(Job const& job)
{
    std::size_t const maps = job.rank == 0 ? 3 : 2;
    return maps * map_floats(job) + Parameters::floats(job) + 2 * job.states * LANES;
}

void scan_tile(Job const& job, std::size_t index, float* scratch)
{
    Tile const tile(job, index);
    float* const x = scratch;
    float* const y = x + map_floats(job);
    float* const dt = y + map_floats(job);
    float* const state = job.rank == 0 ? dt + map_floats(job) : dt;
    float* const parameters = state + 2 * job.states * LANES;
    load_x(job, tile, x);
    Floats const skip = skip_of(job, tile);
    for (std::size_t k = 0; k < job.directions; ++k)
    {
        if (job.rank == 0)
        {
            load_dt(job, tile, k, dt);
        }
        clear(state, 2 * job.states);
        Output const output = k == 0 ? first_output(job) : Output::added;
        Direction const direction{packed_of(job, tile, k), job.orders + k * job.padded, x, dt, y, skip, output, state,
            nullptr};
        run(job, direction, Parameters(job, tile, k, parameters), 0, job.padded);
    }
    store_y(job, tile, y, 0, job.positions);
}

void load_tile(Job const& job, std::size_t index, std::size_t part)
{
    Tile const tile(job, index);
    if (part == 0)
    {
        load_x(job, tile, job.tiles_x + index * map_floats(job));
    }
    else
    {
        load_dt(job, tile, part - 1, job.tiles_dt + (index * job.directions + part - 1) * map_floats(job));
    }
}

std::size_t segment_floats(Job const& job)
{
    return Parameters::floats(job) + 2 * job.states * LANES;
}

// The state with which a segment starts: each one before it hands its own on, decayed by the steps behind it.
void carry(Job const& job, float const* carried, std::size_t segment, Parameters const& parameters, float* state)
{
    std::size_t const rows = 2 * job.states + 2;
    for (std::size_t s = 0; s < segment; ++s)
    {
        float const* const found = carried + s * rows * LANES;
        Floats const steps = load(found + 2 * job.states * LANES);
        for (std::size_t n = 0; n < job.states; ++n)
        {
            Floats const t[1] = {steps * load(parameters.A + n * LANES)};
            Floats decay[1];
            exp2_of<false>(t, decay);
            store(state + n * LANES, decay[0] * load(state + n * LANES) + load(found + n * LANES));
        }
    }
}

void scan_segment(Job const& job, std::size_t index, std::size_t direction, std::size_t segment, bool last_pass,
    float* scratch)
{
    Tile const tile(job, index);
    float* const state = scratch;
    Parameters const parameters(job, tile, direction, scratch + 2 * job.states * LANES);
    std::size_t const part = index * job.directions + direction;
    std::size_t const rows = 2 * job.states + 2;
    float* const carried = job.carried + part * job.segments * rows * LANES;
    std::size_t const begin = segment * job.segment;
    std::size_t const end = begin + job.segment < job.padded ? begin + job.segment : job.padded;
    Direction found{packed_of(job, tile, direction), job.orders + direction * job.padded,
        job.tiles_x + index * map_floats(job), job.rank == 0 ? job.tiles_dt + part * map_floats(job) : nullptr,
        job.tiles_y + part * map_floats(job), spread(0.0F), Output::alone, state, nullptr};
    if (last_pass)
    {
        clear(state, 2 * job.states);
        carry(job, carried, segment, parameters, state);
    }
    else
    {
        found.state = carried + segment * rows * LANES;
        found.steps = found.state + 2 * job.states * LANES;
        found.output = Output::none;
        clear(found.state, rows);
    }
    run(job, found, parameters, begin, end);
}

// Adds the directions up as `scan_tile` does, in the same order and rounding.
void merge_tile(Job const& job, std::size_t index, std::size_t begin, std::size_t end)
{
    Tile const tile(job, index);
    Floats const skip = skip_of(job, tile);
    float const* const x = job.tiles_x + index * map_floats(job);
    float* const first = job.tiles_y + index * job.directions * map_floats(job);
    for (std::size_t l = begin; l < end; ++l)
    {
        Floats y = load(first + l * LANES);
        if (first_output(job) == Output::first)
        {
            y = skip * load(x + l * LANES) + y;
        }
        for (std::size_t k = 1; k < job.directions; ++k)
        {
            y = y + load(first + k * map_floats(job) + l * LANES);
        }
        store(first + l * LANES, y);
    }
    store_y(job, tile, first, begin, end);
}

} // namespace

#define QUARTERMAP_INSTRUCTION_SET(label)                                                                              \
    quartermap::cpu::InstructionSet                                                                                    \
    {                                                                                                                  \
        label, LANES, pack, tile_floats, scan_tile, load_tile, segment_floats, scan_segment, merge_tile, normalize     \
    }
