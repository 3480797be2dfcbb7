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

// Maps that lie one behind the other, to be staged in rows that do so too.
template <typename T>
struct Source
{
    T const* maps;
    int count;
    T* stage;
};

// Copies one place of some maps, `stride` elements apart; four loads are in flight before the first is needed.
template <typename T>
QUARTERMAP_DEVICE void stage_place(T const* from, int stride, int count, T* to, int stage_row)
{
    QUARTERMAP_NO_UNROLL
    for (; count >= 4; count -= 4)
    {
        T values[4];
        QUARTERMAP_UNROLL
        for (int u = 0; u < 4; ++u)
        {
            values[u] = read_only(from);
            from += stride;
        }
        QUARTERMAP_UNROLL
        for (int u = 0; u < 4; ++u)
        {
            *to = values[u];
            to += stage_row;
        }
    }
    QUARTERMAP_NO_UNROLL
    for (; count > 0; --count)
    {
        *to = read_only(from);
        from += stride;
        to += stage_row;
    }
}

// Copies a chunk of the time step's maps, and perhaps of those of B and C, to shared memory: along the rows of the map in
// every direction. kOneState: B and C have one map each.
template <typename T, bool kOneState>
QUARTERMAP_DEVICE void stage_chunk(Source<T> const& dt, Source<T> const& b, Source<T> const& c, LaunchPlan const& plan,
    Chunk const& chunk, int height, int width)
{
    int const stride = height * width;
    int const count = chunk.tiled ? height * chunk.columns : chunk.high - chunk.low;
    // Rows of a tile, columns of the map, or one row that is never left.
    Visit at(chunk.tiled || !chunk.column ? thread_index() : chunk.low + thread_index(), thread_count(),
        chunk.tiled ? chunk.columns : chunk.column ? height : count);
    for (int t = thread_index(); t < count; t += thread_count())
    {
        int place = t;
        int raster = chunk.low + t;
        if (chunk.tiled)
        {
            place = at.row * plan.stage_pitch + at.column;
            raster = at.row * width + chunk.first_column + at.column;
        }
        else if (chunk.column)
        {
            raster = at.column * width + at.row;
        }
        if constexpr (kOneState)
        {
            if (b.count > 0)
            {
                T const values[2] = {read_only(b.maps + raster), read_only(c.maps + raster)};
                b.stage[place] = values[0];
                c.stage[place] = values[1];
            }
        }
        else
        {
            stage_place(b.maps + raster, stride, b.count, b.stage + place, plan.stage_row);
            stage_place(c.maps + raster, stride, c.count, c.stage + place, plan.stage_row);
        }
        stage_place(dt.maps + raster, stride, dt.count, dt.stage + place, plan.stage_row);
        at.next();
    }
}

// Composes the maps of all threads of a group. On entry `running` is the map over the thread's positions; on return
// `state`, which was the state before the chunk, is the state before the thread's first position, and `carry` that after
// the chunk.
template <int kChannels>
QUARTERMAP_DEVICE void scan_group(LaunchPlan const& plan, Place const& place, Affine (&running)[kChannels],
    Affine* totals, float (&state)[kChannels], float (&carry)[kChannels])
{
    int const width = plan.sequence_threads < 32 ? plan.sequence_threads : 32;
    int const lane = place.lane % width;
    for (int distance = 1; distance < width; distance *= 2)
    {
        QUARTERMAP_UNROLL
        for (int c = 0; c < kChannels; ++c)
        {
            Affine const earlier
                = {from_earlier_lane(running[c].a, distance, width), from_earlier_lane(running[c].b, distance, width)};
            running[c] = lane >= distance ? compose(earlier, running[c]) : running[c];
        }
    }
    Affine before[kChannels];
    Affine whole[kChannels];
    QUARTERMAP_UNROLL
    for (int c = 0; c < kChannels; ++c)
    {
        Affine const previous
            = {from_earlier_lane(running[c].a, 1, width), from_earlier_lane(running[c].b, 1, width)};
        before[c] = lane > 0 ? previous : Affine{1.0F, 0.0F};
        whole[c] = {from_lane(running[c].a, width - 1, width), from_lane(running[c].b, width - 1, width)};
    }
    if (plan.warps > 1)
    {
        int const warp = place.lane / 32;
        Affine* row = totals + place.group * plan.warps * kChannels;
        if (lane == 0)
        {
            QUARTERMAP_UNROLL
            for (int c = 0; c < kChannels; ++c)
            {
                row[warp * kChannels + c] = whole[c];
            }
        }
        wait_for_block();
        QUARTERMAP_UNROLL
        for (int c = 0; c < kChannels; ++c)
        {
            carry[c] = state[c];
        }
        for (int w = 0; w < plan.warps; ++w)
        {
            bool const own = w == warp;
            QUARTERMAP_UNROLL
            for (int c = 0; c < kChannels; ++c)
            {
                Affine const step = *row++;
                state[c] = own ? carry[c] : state[c];
                carry[c] = step.a * carry[c] + step.b;
            }
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

// Saves the multiplication for each access.
template <typename T>
QUARTERMAP_DEVICE T element_at(T const* row, int bytes)
{
    return *reinterpret_cast<T const*>(reinterpret_cast<char const*>(row) + bytes);
}

// Consecutive numbers that are read at once.
template <int kCount>
struct alignas(4 * kCount) Floats
{
    float values[kCount];
};

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
    float* const skips = reinterpret_cast<float*>(shared + plan.skips_at);
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
    for (int c = thread_index(); c < tile_channels; c += thread_count())
    {
        int const channel = place.channel0 + (c < valid_channels ? c : valid_channels - 1);
        skips[c] = 0.0F;
        for (int k = 0; k < scan.direction_count; ++k)
        {
            skips[c] += read_only(arguments.tensors.D + k * d_inner + channel);
        }
    }
    wait_for_block();
    {
        Visit place_in_map(thread_index(), thread_count(), width);
        for (int t = thread_index(); t < length; t += thread_count())
        {
            int at = kResident ? place_in_map.row * plan.map_pitch + place_in_map.column : t;
            T const* from = x + t;
            for (int c = 0; c < tile_channels; ++c)
            {
                T const value = read_only(from);
                if constexpr (kResident)
                {
                    reinterpret_cast<T*>(shared + plan.x_at)[at] = value;
                }
                sum[at] = skips[c] * to_float(value);
                at += kResident ? plan.map_size : length;
                from += c + 1 < valid_channels ? length : 0;
            }
            place_in_map.next();
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

            // Where the thread's positions lie in the maps and in the stage; past the end, where the last one lies. What
            // is computed there reaches nothing: it comes last in the order of the scan, and is not added to the sum.
            int const own_begin = begin + place.lane * kPositions;
            int const valid = length - own_begin < kPositions ? length - own_begin : kPositions;
            int in_map[kPositions];
            int in_stage[kPositions]; // in bytes
            {
                bool const reverse = is_reverse(direction);
                int const start = own_begin < length ? own_begin : length - 1;
                int const q = reverse ? length - 1 - start : start;
                int const inner_size = column ? height : width;
                int const outer = q / inner_size;
                int inner = q - outer * inner_size;
                int const last = reverse ? 0 : inner_size - 1;
                int const pitch = kResident ? plan.map_pitch : width;
                Strides const map = column ? Strides{pitch, 1} : Strides{1, pitch};
                Increments const map_by(map, inner_size, reverse);
                in_map[0] = inner * map.inner + outer * map.outer;
                // Staged in the order of the scan, neighbours are neighbours.
                constexpr int kBytes = static_cast<int>(sizeof(T));
                Increments staged_by(kBytes, reverse);
                in_stage[0] = (q - chunk.low) * kBytes;
                if (chunk.tiled)
                {
                    staged_by = Increments({plan.stage_pitch * kBytes, kBytes}, inner_size, reverse);
                    in_stage[0] = (inner * plan.stage_pitch + outer - chunk.first_column) * kBytes;
                }
                QUARTERMAP_UNROLL
                for (int j = 1; j < kPositions; ++j)
                {
                    bool const wraps = inner == last;
                    inner = wraps ? inner_size - 1 - last : inner + (reverse ? -1 : 1);
                    in_map[j] = in_map[j - 1] + (j >= valid ? 0 : wraps ? map_by.wrap : map_by.step);
                    in_stage[j] = in_stage[j - 1] + (j >= valid ? 0 : wraps ? staged_by.wrap : staged_by.step);
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
                // Channels past the last have no time steps to stage; their threads read those of the last.
                int const present = kLowRank || r0 + count <= valid_channels ? count : valid_channels - r0;
                int const first_states = r0 > 0 ? 0 : states < plan.state_tile ? states : plan.state_tile;
                stage_chunk<T, kOneState>({dt_maps + static_cast<std::int64_t>(r0) * length, present, stage},
                    {b_maps, first_states, stage_bc},
                    {c_maps, first_states, stage_bc + plan.state_tile * plan.stage_row}, plan, chunk, height, width);
                wait_for_block();
                if constexpr (kLowRank)
                {
                    for (int r = 0; r < count; ++r)
                    {
                        auto const weight = *reinterpret_cast<Floats<kChannels> const*>(
                            weights + (r0 + r) * tile_channels + place.first);
                        T const* const row = stage + r * plan.stage_row;
                        QUARTERMAP_UNROLL
                        for (int j = 0; j < kPositions; ++j)
                        {
                            float const value = to_float(element_at(row, in_stage[j]));
                            QUARTERMAP_UNROLL
                            for (int c = 0; c < kChannels; ++c)
                            {
                                dt[c][j] += weight.values[c] * value;
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
                            dt[c][j] += to_float(element_at(stage + channels[c] * plan.stage_row, in_stage[j]));
                        }
                    }
                }
            }

            if (scan.softplus)
            {
                QUARTERMAP_UNROLL
                for (int c = 0; c < kChannels; ++c)
                {
                    QUARTERMAP_UNROLL
                    for (int j = 0; j < kPositions; ++j)
                    {
                        dt[c][j] = softplus(dt[c][j]);
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
                    drive[c][j] = dt[c][j] * to_float(from[in_map[j]]);
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
                    std::int64_t const from = static_cast<std::int64_t>(n) * length;
                    stage_chunk<T, kOneState>({dt_maps, 0, stage}, {b_maps + from, n_count, stage_bc},
                        {c_maps + from, n_count, stage_bc + plan.state_tile * plan.stage_row}, plan, chunk, height,
                        width);
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
                    input_weight[j] = to_float(element_at(stage_b, in_stage[j]));
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
                    float const output_weight = to_float(element_at(stage_c, in_stage[j]));
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
    Visit place_in_map(thread_index(), thread_count(), width);
    for (int t = thread_index(); t < length; t += thread_count())
    {
        int at = kResident ? place_in_map.row * plan.map_pitch + place_in_map.column : t;
        T* to = y + t;
        for (int c = 0; c < valid_channels; ++c)
        {
            store(sum[at], *to);
            at += kResident ? plan.map_size : length;
            to += length;
        }
        place_in_map.next();
    }
}

} // namespace quartermap
