// The kernel: one launch for all directions.
//
// A block reads the maps of its channels once, walks the K orders one after the other by index arithmetic, adds what
// every direction gives to the sum in shared memory, and writes that once. In a direction, chunk after chunk:
//
//   1. dt, B and C of the chunk, which all channels of the block share, are staged in shared memory. The reads run along
//      the rows of the map in every direction, so that neighbouring threads read neighbouring addresses.
//   2. Each thread projects the time step for its positions and channels (in registers; a staged value serves all its
//      channels), applies bias and softplus, and forms the maps h -> a h + b.
//   3. The maps are composed: over the positions of a thread, over the lanes of a warp by shuffles, over the warps of
//      the group through shared memory, and with the state that the previous chunk left.
//   4. Each thread walks its positions again from the right state and adds C h to the sum.
//
// Maps that do not fit (kResident = false) stay in global memory: x is then read once for each direction, mostly from
// the cache, and the sum is a float32 workspace.
#pragma once

#include "device.h"
#include "element_types.h"
#include "kernel_arguments.h"
#include "quartermap/selective_scan.h"
#include "recurrence.h"
#include "scan_order.h"

namespace quartermap
{

// What depends on nothing but the thread and the block.
struct Place
{
    int group;
    int lane;     // among the threads of the group
    int first;    // channel of this thread, within the block
    int channel0; // first channel of the block
    std::int64_t batch;
};

// The part of the map that a chunk covers: places [low, high) along the orientation.
struct Chunk
{
    int low;
    int high;
    bool column;
    bool tiled;
    int first_column;
    int columns;
};

QUARTERMAP_DEVICE Chunk chunk_at(LaunchPlan const& plan, int direction, int begin, int height, int length)
{
    Chunk chunk;
    int const end = begin + plan.chunk < length ? begin + plan.chunk : length;
    chunk.low = is_reverse(direction) ? length - end : begin;
    chunk.high = is_reverse(direction) ? length - begin : end;
    chunk.column = is_column(direction);
    chunk.tiled = chunk.column && plan.stage_tiled;
    chunk.first_column = chunk.tiled ? chunk.low / height : 0;
    chunk.columns = chunk.tiled ? (chunk.high - 1) / height - chunk.first_column + 1 : 0;
    return chunk;
}

// Copies a chunk of `rows` maps, `stride` elements apart, to shared memory. A row r past `valid` repeats the last one.
template <typename T>
QUARTERMAP_DEVICE void stage_rows(T const* source, int rows, int valid, LaunchPlan const& plan, Chunk const& chunk,
    int height, int width, T* stage)
{
    std::int64_t const stride = static_cast<std::int64_t>(height) * width;
    int const count = chunk.tiled ? height * chunk.columns : chunk.high - chunk.low;
    for (int t = thread_index(); t < count; t += thread_count())
    {
        int place = t;
        std::int64_t raster = chunk.low + t;
        if (chunk.tiled)
        {
            int const h = t / chunk.columns;
            int const w = t - h * chunk.columns;
            place = h * plan.stage_pitch + w;
            raster = static_cast<std::int64_t>(h) * width + chunk.first_column + w;
        }
        else if (chunk.column)
        {
            int const q = chunk.low + t;
            int const w = q / height;
            raster = static_cast<std::int64_t>(q - w * height) * width + w;
        }
        T const* from = source + raster;
        T* to = stage + place;
        for (int r = 0; r < rows; r += 4)
        {
            // Four loads in flight before the first is needed.
            T values[4];
            QUARTERMAP_UNROLL
            for (int u = 0; u < 4; ++u)
            {
                int const row = r + u < valid ? r + u : valid - 1;
                values[u] = read_only(from + row * stride);
            }
            QUARTERMAP_UNROLL
            for (int u = 0; u < 4; ++u)
            {
                if (r + u < rows)
                {
                    to[(r + u) * plan.stage_row] = values[u];
                }
            }
        }
    }
}

// Composes the maps of all threads of a group. On entry `own` is the map over the thread's positions; on return `state`,
// which was the state before the chunk, is the state before the thread's first position, and `carry` that after the chunk.
template <int kChannels>
QUARTERMAP_DEVICE void scan_group(LaunchPlan const& plan, Place const& place, Affine const (&own)[kChannels],
    Affine* totals, float (&state)[kChannels], float (&carry)[kChannels])
{
    int const width = plan.sequence_threads < 32 ? plan.sequence_threads : 32;
    int const lane = place.lane % width;
    Affine before[kChannels];
    Affine whole[kChannels];
    QUARTERMAP_UNROLL
    for (int c = 0; c < kChannels; ++c)
    {
        Affine running = own[c];
        for (int distance = 1; distance < width; distance *= 2)
        {
            Affine const earlier
                = {from_earlier_lane(running.a, distance, width), from_earlier_lane(running.b, distance, width)};
            running = lane >= distance ? compose(earlier, running) : running;
        }
        Affine const previous = {from_earlier_lane(running.a, 1, width), from_earlier_lane(running.b, 1, width)};
        before[c] = lane > 0 ? previous : Affine{1.0F, 0.0F};
        whole[c] = {from_lane(running.a, width - 1, width), from_lane(running.b, width - 1, width)};
    }
    if (plan.warps > 1)
    {
        int const warp = place.lane / 32;
        Affine* row = totals + place.group * kChannels * plan.warps;
        if (lane == 0)
        {
            QUARTERMAP_UNROLL
            for (int c = 0; c < kChannels; ++c)
            {
                row[c * plan.warps + warp] = whole[c];
            }
        }
        wait_for_block();
        QUARTERMAP_UNROLL
        for (int c = 0; c < kChannels; ++c)
        {
            float running = state[c];
            for (int w = 0; w < plan.warps; ++w)
            {
                state[c] = w == warp ? running : state[c];
                Affine const step = row[c * plan.warps + w];
                running = step.a * running + step.b;
            }
            carry[c] = running;
        }
    }
    else
    {
        QUARTERMAP_UNROLL
        for (int c = 0; c < kChannels; ++c)
        {
            carry[c] = whole[c].a * state[c] + whole[c].b;
        }
    }
    QUARTERMAP_UNROLL
    for (int c = 0; c < kChannels; ++c)
    {
        state[c] = before[c].a * state[c] + before[c].b;
    }
}

// kOneState: d_state is 1, and the state stays in registers. kLowRank: the time step is projected here.
template <typename T, int kChannels, bool kOneState, bool kLowRank, bool kResident>
QUARTERMAP_KERNEL(kMaxThreads, 2)
void selective_scan_kernel(KernelArguments const arguments)
{
    LaunchPlan const& plan = arguments.plan;
    QuartermapScan const& scan = arguments.scan;
    int const height = static_cast<int>(scan.height);
    int const width = static_cast<int>(scan.width);
    int const length = height * width;
    int const d_inner = static_cast<int>(scan.d_inner);
    int const states = kOneState ? 1 : static_cast<int>(scan.d_state);
    int const rank = static_cast<int>(scan.dt_rank);
    int const tile_channels = plan.groups * kChannels;

    Place place;
    place.group = thread_index() / plan.sequence_threads;
    place.lane = thread_index() - place.group * plan.sequence_threads;
    place.first = place.group * kChannels;
    place.batch = block_index() / static_cast<unsigned>(plan.tiles);
    place.channel0 = static_cast<int>(block_index() % static_cast<unsigned>(plan.tiles)) * tile_channels;
    // Channels past the last, in the last tile, repeat the last: computed for nothing, and not written.
    int const valid_channels = d_inner - place.channel0 < tile_channels ? d_inner - place.channel0 : tile_channels;

    char* const shared = shared_memory();
    float* const weights = reinterpret_cast<float*>(shared + plan.weights_at);
    Affine* const totals = reinterpret_cast<Affine*>(shared + plan.totals_at);
    float* const carries = reinterpret_cast<float*>(shared + plan.carries_at);
    T* const stage = reinterpret_cast<T*>(shared + plan.stage_at);
    T* const stage_bc = stage + plan.rank_tile * plan.stage_row;

    std::int64_t const maps_at = (place.batch * d_inner + place.channel0) * length;
    T const* const x = static_cast<T const*>(arguments.tensors.x) + maps_at;
    T* const y = static_cast<T*>(arguments.tensors.y) + maps_at;
    float* sum;
    T const* input;
    if constexpr (kResident)
    {
        sum = reinterpret_cast<float*>(shared);
        input = reinterpret_cast<T const*>(shared + plan.x_at);
    }
    else
    {
        sum = arguments.sum + maps_at;
        input = x;
    }

    // Reads x, and begins the sum with the skip connection of all directions.
    for (int c = 0; c < tile_channels; ++c)
    {
        int const channel = c < valid_channels ? c : valid_channels - 1;
        float skip = 0.0F;
        for (int k = 0; k < scan.direction_count; ++k)
        {
            skip += read_only(arguments.tensors.D + k * d_inner + place.channel0 + channel);
        }
        T const* const from = x + static_cast<std::int64_t>(channel) * length;
        for (int t = thread_index(); t < length; t += thread_count())
        {
            int at = t;
            T const value = read_only(from + t);
            if constexpr (kResident)
            {
                int const h = t / width;
                at = c * plan.map_size + h * plan.map_pitch + (t - h * width);
                reinterpret_cast<T*>(shared + plan.x_at)[at] = value;
            }
            sum[at] = skip * to_float(value);
        }
    }

    int parity = 0;
    for (int k = 0; k < scan.direction_count; ++k)
    {
        int const direction = scan.directions[k];
        bool const column = is_column(direction);
        std::int64_t const parameters_at = static_cast<std::int64_t>(k) * d_inner + place.channel0;

        int channels[kChannels];
        float bias[kChannels];
        float state_matrix[kChannels]; // of the only state, for powers of two
        float carry[kChannels];
        QUARTERMAP_UNROLL
        for (int c = 0; c < kChannels; ++c)
        {
            channels[c] = place.first + c < valid_channels ? place.first + c : valid_channels - 1;
            bias[c] = read_only(arguments.tensors.dt_bias + parameters_at + channels[c]);
            state_matrix[c]
                = kOneState ? kLog2E * read_only(arguments.tensors.A + parameters_at + channels[c]) : 0.0F;
            carry[c] = 0.0F;
        }
        wait_for_block(); // for the weights and carries of the direction before to have been read
        if constexpr (kLowRank)
        {
            T const* const from = static_cast<T const*>(arguments.tensors.dt_weight);
            for (int t = thread_index(); t < rank * tile_channels; t += thread_count())
            {
                int const c = t / rank;
                int const channel = c < valid_channels ? c : valid_channels - 1;
                // Neighbouring threads read neighbouring ranks; the kernel wants neighbouring channels.
                weights[(t - c * rank) * tile_channels + c]
                    = to_float(read_only(from + (parameters_at + channel) * rank + (t - c * rank)));
            }
        }
        if constexpr (!kOneState)
        {
            for (int t = thread_index(); t < tile_channels * states; t += thread_count())
            {
                carries[t] = 0.0F;
            }
        }

        std::int64_t const group_of_maps = place.batch * scan.direction_count + k;
        T const* const dt_maps = static_cast<T const*>(arguments.tensors.dt)
            + (kLowRank ? group_of_maps * rank : group_of_maps * d_inner + place.channel0) * length;
        T const* const b_maps = static_cast<T const*>(arguments.tensors.B) + group_of_maps * states * length;
        T const* const c_maps = static_cast<T const*>(arguments.tensors.C) + group_of_maps * states * length;

        for (int n_chunk = 0; n_chunk < plan.chunks; ++n_chunk)
        {
            int const begin = n_chunk * plan.chunk;
            Chunk const chunk = chunk_at(plan, direction, begin, height, length);

            // Where the thread's positions lie in the maps and in the stage; past the end, where the last one lies.
            int const own_begin = begin + place.lane * kPositions;
            int const valid = length - own_begin < kPositions ? length - own_begin : kPositions;
            int in_map[kPositions];
            int in_stage[kPositions];
            {
                int const start = own_begin < length ? own_begin : length - 1;
                int q = is_reverse(direction) ? length - 1 - start : start;
                Walk walk(q, column ? height : width, is_reverse(direction));
                QUARTERMAP_UNROLL
                for (int j = 0; j < kPositions; ++j)
                {
                    int const h = column ? walk.inner : walk.outer;
                    int const w = column ? walk.outer : walk.inner;
                    in_map[j] = h * (kResident ? plan.map_pitch : width) + w;
                    in_stage[j]
                        = chunk.tiled ? h * plan.stage_pitch + w - chunk.first_column : q - chunk.low;
                    if (j + 1 < valid)
                    {
                        walk.step();
                        q += is_reverse(direction) ? -1 : 1;
                    }
                }
            }

            float dt[kChannels][kPositions];
            QUARTERMAP_UNROLL
            for (int c = 0; c < kChannels; ++c)
            {
                QUARTERMAP_UNROLL
                for (int j = 0; j < kPositions; ++j)
                {
                    dt[c][j] = bias[c];
                }
            }
            int const rows = kLowRank ? rank : tile_channels;
            for (int r0 = 0; r0 < rows; r0 += plan.rank_tile)
            {
                int const count = rows - r0 < plan.rank_tile ? rows - r0 : plan.rank_tile;
                wait_for_block(); // for what was staged before to have been read
                stage_rows(dt_maps + static_cast<std::int64_t>(r0) * length, count,
                    kLowRank ? count : valid_channels, plan, chunk, height, width, stage);
                if (r0 == 0)
                {
                    int const n_count = states < plan.state_tile ? states : plan.state_tile;
                    stage_rows(b_maps, n_count, n_count, plan, chunk, height, width, stage_bc);
                    stage_rows(c_maps, n_count, n_count, plan, chunk, height, width,
                        stage_bc + plan.state_tile * plan.stage_row);
                }
                wait_for_block();
                if constexpr (kLowRank)
                {
                    for (int r = 0; r < count; ++r)
                    {
                        float weight[kChannels];
                        QUARTERMAP_UNROLL
                        for (int c = 0; c < kChannels; ++c)
                        {
                            weight[c] = weights[(r0 + r) * tile_channels + place.first + c];
                        }
                        QUARTERMAP_UNROLL
                        for (int j = 0; j < kPositions; ++j)
                        {
                            float const value = to_float(stage[r * plan.stage_row + in_stage[j]]);
                            QUARTERMAP_UNROLL
                            for (int c = 0; c < kChannels; ++c)
                            {
                                dt[c][j] += weight[c] * value;
                            }
                        }
                    }
                }
                else
                {
                    QUARTERMAP_UNROLL
                    for (int c = 0; c < kChannels; ++c)
                    {
                        QUARTERMAP_UNROLL
                        for (int j = 0; j < kPositions; ++j)
                        {
                            dt[c][j] += to_float(stage[(place.first + c) * plan.stage_row + in_stage[j]]);
                        }
                    }
                }
            }

            float drive[kChannels][kPositions]; // dt x
            QUARTERMAP_UNROLL
            for (int c = 0; c < kChannels; ++c)
            {
                T const* const from = input
                    + (kResident ? static_cast<std::int64_t>(place.first + c) * plan.map_size
                                 : static_cast<std::int64_t>(channels[c]) * length);
                QUARTERMAP_UNROLL
                for (int j = 0; j < kPositions; ++j)
                {
                    float const step = scan.softplus ? softplus(dt[c][j]) : dt[c][j];
                    // Past the end nothing happens: a step of zero keeps the state.
                    dt[c][j] = j < valid ? step : 0.0F;
                    drive[c][j] = j < valid ? step * to_float(from[in_map[j]]) : 0.0F;
                }
            }

            float result[kChannels][kPositions];
            if constexpr (!kOneState)
            {
                QUARTERMAP_UNROLL
                for (int c = 0; c < kChannels; ++c)
                {
                    QUARTERMAP_UNROLL
                    for (int j = 0; j < kPositions; ++j)
                    {
                        result[c][j] = 0.0F;
                    }
                }
            }
            for (int n = 0; n < states; ++n)
            {
                int const n_staged = n % plan.state_tile;
                if (!kOneState && n > 0 && n_staged == 0)
                {
                    int const n_count = states - n < plan.state_tile ? states - n : plan.state_tile;
                    wait_for_block();
                    stage_rows(b_maps + static_cast<std::int64_t>(n) * length, n_count, n_count, plan, chunk, height,
                        width, stage_bc);
                    stage_rows(c_maps + static_cast<std::int64_t>(n) * length, n_count, n_count, plan, chunk, height,
                        width, stage_bc + plan.state_tile * plan.stage_row);
                    wait_for_block();
                }
                T const* const stage_b = stage_bc + n_staged * plan.stage_row;
                T const* const stage_c = stage_b + plan.state_tile * plan.stage_row;
                float* const carries_in = carries + (n_chunk & 1) * tile_channels * states;
                float* const carries_out = carries + ((n_chunk + 1) & 1) * tile_channels * states;

                Affine step[kChannels][kPositions];
                Affine own[kChannels];
                float state[kChannels];
                float input_weight[kPositions];
                QUARTERMAP_UNROLL
                for (int j = 0; j < kPositions; ++j)
                {
                    input_weight[j] = to_float(stage_b[in_stage[j]]);
                }
                QUARTERMAP_UNROLL
                for (int c = 0; c < kChannels; ++c)
                {
                    float const exponent = kOneState
                        ? state_matrix[c]
                        : kLog2E * read_only(arguments.tensors.A + (parameters_at + channels[c]) * states + n);
                    state[c] = kOneState ? carry[c] : carries_in[(place.first + c) * states + n];
                    QUARTERMAP_UNROLL
                    for (int j = 0; j < kPositions; ++j)
                    {
                        step[c][j] = {power_of_two(dt[c][j] * exponent), drive[c][j] * input_weight[j]};
                        own[c] = j == 0 ? step[c][0] : compose(own[c], step[c][j]);
                    }
                }
                scan_group<kChannels>(
                    plan, place, own, totals + parity * tile_channels * plan.warps, state, carry);
                parity ^= 1;
                if (!kOneState && place.lane == 0)
                {
                    QUARTERMAP_UNROLL
                    for (int c = 0; c < kChannels; ++c)
                    {
                        carries_out[(place.first + c) * states + n] = carry[c];
                    }
                }
                QUARTERMAP_UNROLL
                for (int j = 0; j < kPositions; ++j)
                {
                    float const output_weight = to_float(stage_c[in_stage[j]]);
                    QUARTERMAP_UNROLL
                    for (int c = 0; c < kChannels; ++c)
                    {
                        state[c] = step[c][j].a * state[c] + step[c][j].b;
                        result[c][j] = (kOneState ? 0.0F : result[c][j]) + output_weight * state[c];
                    }
                }
            }

            // In one chunk each position belongs to one thread, and a barrier lies between any two chunks.
            QUARTERMAP_UNROLL
            for (int c = 0; c < kChannels; ++c)
            {
                float* const to = sum + (kResident ? (place.first + c) * plan.map_size : 0);
                QUARTERMAP_UNROLL
                for (int j = 0; j < kPositions; ++j)
                {
                    if (j < valid)
                    {
                        to[in_map[j]] += result[c][j];
                    }
                }
            }
        }
    }

    wait_for_block();
    for (int c = 0; c < valid_channels; ++c)
    {
        for (int t = thread_index(); t < length; t += thread_count())
        {
            int at = t;
            if constexpr (kResident)
            {
                int const h = t / width;
                at = c * plan.map_size + h * plan.map_pitch + (t - h * width);
            }
            store(sum[at], y[static_cast<std::int64_t>(c) * length + t]);
        }
    }
}

} // namespace quartermap
