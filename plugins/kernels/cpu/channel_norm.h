// Layer normalisation over the channels of maps that lie channel-first, without turning them over: vectors of positions walk
// over the channels three times, for the mean, the variance and the result. Included by each instruction set.
#pragma once

#include <cmath>

#include "norm_job.h"
#include "simd.h"

namespace
{

using quartermap::cpu::NormJob;

// Channels that are added up before their sum is added to the others': a long sum of small numbers loses what they are worth.
constexpr std::size_t CHANNELS_OF_A_SUM = 32;

// 1 / sqrt(v), rounded as the square root and the division are.
QUARTERMAP_INLINED Floats inverse_root(Floats value)
{
#if QUARTERMAP_LANES == 16 && defined(__AVX512F__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
    return _mm512_div_ps(spread(1.0F), _mm512_sqrt_ps(value));
#elif QUARTERMAP_LANES == 8 && defined(__AVX2__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
    return _mm256_div_ps(spread(1.0F), _mm256_sqrt_ps(value));
#else
    float values[LANES];
    store(values, value);
    for (std::size_t i = 0; i < LANES; ++i)
    {
        values[i] = 1.0F / std::sqrt(values[i]);
    }
    return load(values);
#endif
}

// Of every channel, the sum of what `term` makes of the vectors that begin at a position, divided by the channels.
template <std::size_t Vectors, typename Term>
QUARTERMAP_INLINED void mean_of(NormJob const& job, float const* from, Term const& term, Floats* mean)
{
    for (std::size_t v = 0; v < Vectors; ++v)
    {
        mean[v] = spread(0.0F);
    }
    for (std::size_t begin = 0; begin < job.channels; begin += CHANNELS_OF_A_SUM)
    {
        std::size_t const end = begin + CHANNELS_OF_A_SUM < job.channels ? begin + CHANNELS_OF_A_SUM : job.channels;
        Floats sum[Vectors];
        for (std::size_t v = 0; v < Vectors; ++v)
        {
            sum[v] = spread(0.0F);
        }
        for (std::size_t c = begin; c < end; ++c)
        {
            for (std::size_t v = 0; v < Vectors; ++v)
            {
                sum[v] = sum[v] + term(load(from + c * job.positions + v * LANES), v);
            }
        }
        for (std::size_t v = 0; v < Vectors; ++v)
        {
            mean[v] = mean[v] + sum[v];
        }
    }
    Floats const part = spread(1.0F / static_cast<float>(job.channels));
    for (std::size_t v = 0; v < Vectors; ++v)
    {
        mean[v] = mean[v] * part;
    }
}

// Normalises some vectors of neighbouring positions.
template <std::size_t Vectors>
void normalize_vectors(NormJob const& job, float const* from, float* to)
{
    Floats mean[Vectors];
    mean_of<Vectors>(job, from, [](Floats value, std::size_t) { return value; }, mean);
    Floats factor[Vectors];
    mean_of<Vectors>(
        job, from,
        [&](Floats value, std::size_t v)
        {
            Floats const off = value - mean[v];
            return off * off;
        },
        factor);
    for (std::size_t v = 0; v < Vectors; ++v)
    {
        factor[v] = inverse_root(factor[v] + spread(job.epsilon));
    }
    for (std::size_t c = 0; c < job.channels; ++c)
    {
        Floats const scale = spread(job.scale[c]);
        Floats const bias = spread(job.bias[c]);
        for (std::size_t v = 0; v < Vectors; ++v)
        {
            std::size_t const place = c * job.positions + v * LANES;
            store(to + place, (load(from + place) - mean[v]) * factor[v] * scale + bias);
        }
    }
}

// The same for one position.
void normalize_position(NormJob const& job, float const* from, float* to)
{
    float const part = 1.0F / static_cast<float>(job.channels);
    double sum = 0.0;
    for (std::size_t c = 0; c < job.channels; ++c)
    {
        sum += from[c * job.positions];
    }
    float const mean = static_cast<float>(sum) * part;
    double squares = 0.0;
    for (std::size_t c = 0; c < job.channels; ++c)
    {
        float const off = from[c * job.positions] - mean;
        squares += static_cast<double>(off * off);
    }
    float const factor = 1.0F / std::sqrt(static_cast<float>(squares) * part + job.epsilon);
    for (std::size_t c = 0; c < job.channels; ++c)
    {
        std::size_t const place = c * job.positions;
        to[place] = (from[place] - mean) * factor * job.scale[c] + job.bias[c];
    }
}

void normalize(NormJob const& job, std::size_t image, std::size_t begin, std::size_t end)
{
    float const* const from = job.x + image * job.channels * job.positions;
    float* const to = job.y + image * job.channels * job.positions;
    std::size_t l = begin;
    for (; l + 8 * LANES <= end; l += 8 * LANES)
    {
        normalize_vectors<8>(job, from + l, to + l);
    }
    for (; l + 2 * LANES <= end; l += 2 * LANES)
    {
        normalize_vectors<2>(job, from + l, to + l);
    }
    for (; l + LANES <= end; l += LANES)
    {
        normalize_vectors<1>(job, from + l, to + l);
    }
    for (; l < end; ++l)
    {
        normalize_position(job, from + l, to + l);
    }
}

} // namespace
