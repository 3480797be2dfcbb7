// From the ranks of a tile to its decays and drives: tensor cores project the time step, turn packed halves into
// float32 and multiply by a position's factor; what is left to the other units is two powers of two for each position
// and channel and a polynomial on pairs.
//
// Everything about the time step is in powers of two. With z = log2(e) (dt_weight dt + dt_bias) and t = 2^-|z|,
//
//     s = softplus / ln 2 = log2(1 + t) + max(z, 0),      exp(softplus A) = 2^(s A),      softplus B x = s (B ln 2) x
//
// so that no factor is left over but the ln 2 of the drive, which B takes. The steps and the exponents are float16 for
// both element types: relative roundings of an exponent, never of a decay.
#pragma once

#include "source.h"

namespace quartermap
{
namespace tensor_core
{

constexpr float kLog2OfE = 1.4426950408889634F;

// log2(1 + t) / t on [0, 1] as c0 + t (c1 + t (c2 + t c3)), each step rounded to float16: the coefficients in float16
// with the least largest relative error, 1.6e-3.
constexpr Word kSeries[4] = {0x3DC5u, 0xB99Fu, 0x35DEu, 0xAEDCu};

// What a lane knows of a direction: of its channels g and g + 8, the weights as left factors, the bias, and A.
template <class G>
struct Parameters
{
    Word weight[G::kRankBlocks][2];
    Word bias_weight[2]; // a left factor whose last two ranks are the two halves of the bias
    float bias[2];
    Word decay[2];
};

template <typename T, class G>
QUARTERMAP_DEVICE Parameters<G> load_parameters(KernelArguments const& arguments, int channel0, int k, Lane lane)
{
    Parameters<G> found;
    QUARTERMAP_UNROLL
    for (int m = 0; m < 2; ++m)
    {
        int const row = k * static_cast<int>(arguments.scan.d_inner) + channel0 + lane.g + 8 * m;
        T const* const weight = static_cast<T const*>(arguments.buffers.weight) + row * (8 * kPreparedBlocks<G>);
        Word value[1];
        QUARTERMAP_UNROLL
        for (int s = 0; s < G::kRankBlocks; ++s)
        {
            load_words(weight + 8 * s + 2 * lane.q, value);
            found.weight[s][m] = value[0];
        }
        if constexpr (G::kBias == Bias::kOwnFactor)
        {
            load_words(weight + 8 * G::kRankBlocks + 2 * lane.q, value);
            found.bias_weight[m] = value[0];
        }
        found.bias[m] = G::kBias == Bias::kAddend ? read_only(arguments.buffers.bias + row) : 0.0F;
        float const a = read_only(arguments.tensors.A + row);
        found.decay[m] = pack<Float16>(a, a);
    }
    return found;
}

// Where the row of a rank stands: spare ranks have the weight zero and read the first, but the two that hold the bias
// read ones.
template <class G>
QUARTERMAP_DEVICE Shared rank_row(G const& g, Shared stage, Shared ones, int rank)
{
    if (G::kBias == Bias::kSpareRanks && rank >= 8 * G::kRankBlocks - 2)
    {
        return ones;
    }
    return stage + (rank < g.ranks ? rank : 0) * (G::kTiles * kRowBytes);
}

// Multiplies ranks by their weights, tile after tile; for up to 8 ranks those of four tiles are read at once.
template <typename T, class G>
class Projector
{
public:
    QUARTERMAP_DEVICE Projector(G const& g, Parameters<G> const& parameters, Shared stage, Shared ones, int lane)
        : parameters_(parameters)
    {
        if constexpr (G::kRankBlocks == 1)
        {
            part_ = lane >> 3;
            rows_[0] = rank_row(g, stage, ones, lane & 7);
        }
        else
        {
            QUARTERMAP_UNROLL
            for (int s = 0; s < G::kRankBlocks; s += 4)
            {
                int const part = lane >> 3 < blocks_from(s) ? lane >> 3 : 0;
                rows_[s / 4] = rank_row(g, stage, ones, 8 * (s + part) + (lane & 7));
            }
        }
    }

    // z of tile `j`, which has to be a constant of an unrolled loop and to grow from 0.
    QUARTERMAP_DEVICE void project(int j, float (&z)[4])
    {
        Word const(&weight)[2] = parameters_.weight[0];
        float const(&bias)[2] = parameters_.bias;
        if constexpr (G::kRankBlocks > 1)
        {
            z[0] = z[1] = bias[0];
            z[2] = z[3] = bias[1];
            QUARTERMAP_UNROLL
            for (int s = 0; s < G::kRankBlocks; s += 4)
            {
                add_ranks(j, s, z);
            }
            return;
        }
        if (j % 4 == 0)
        {
            int const tile = j + part_ < G::kTiles ? j + part_ : G::kTiles - 1;
            load_factors(rows_[0] + tile * kRowBytes, ahead_);
        }
        if constexpr (G::kBias == Bias::kOwnFactor)
        {
            z[0] = z[1] = z[2] = z[3] = 0.0F;
            add_matrix_product<T>(z, weight, parameters_.bias_weight, ahead_[j % 4], one_pair<T>());
        }
        else
        {
            matrix_product<T>(z, weight[0], weight[1], ahead_[j % 4], bias[0], bias[0], bias[1], bias[1]);
        }
    }

private:
    // Of the blocks from `s` on, as many as are read at once.
    QUARTERMAP_DEVICE static constexpr int blocks_from(int s)
    {
        return G::kRankBlocks - s < 4 ? G::kRankBlocks - s : 4;
    }

    QUARTERMAP_DEVICE void add_ranks(int j, int s, float (&z)[4])
    {
        int const count = blocks_from(s);
        Shared const from = rows_[s / 4] + j * kRowBytes;
        Word factors[4];
        if (count > 2)
        {
            load_factors(from, factors);
        }
        else if (count == 2)
        {
            load_factors(from, reinterpret_cast<Word(&)[2]>(factors));
        }
        else
        {
            load_factors(from, reinterpret_cast<Word(&)[1]>(factors));
        }
        QUARTERMAP_UNROLL
        for (int t = 0; t < count; t += 2)
        {
            Word const(&weight)[2] = parameters_.weight[s + t];
            if (t + 1 < count)
            {
                add_matrix_product<T>(z, weight, parameters_.weight[s + t + 1], factors[t], factors[t + 1]);
            }
            else if (G::kBias == Bias::kOwnFactor)
            {
                add_matrix_product<T>(z, weight, parameters_.bias_weight, factors[t], one_pair<T>());
            }
            else
            {
                matrix_product<T>(z, weight[0], weight[1], factors[t], z[0], z[1], z[2], z[3]);
            }
        }
    }

    Parameters<G> const& parameters_;
    Shared rows_[(G::kRankBlocks + 3) / 4];
    Word ahead_[4];
    int part_;
};

// Weights in bfloat16 are left as they are, which rounds them no further; those in float16 hold the factor already.
template <typename T>
QUARTERMAP_DEVICE void scale_to_powers_of_two(float (&z)[4])
{
    if constexpr (!kIsFloat16<T>)
    {
        QUARTERMAP_UNROLL
        for (int i = 0; i < 4; ++i)
        {
            z[i] *= kLog2OfE;
        }
    }
}

// softplus / ln 2 of two values of z.
QUARTERMAP_DEVICE Word softplus_pair(float first, float second)
{
    Word const t = pack<Float16>(power_of_two(-fabsf(first)), power_of_two(-fabsf(second)));
    Word series = multiply_add(t, twice(kSeries[3]), twice(kSeries[2]));
    series = multiply_add(series, t, twice(kSeries[1]));
    series = multiply_add(series, t, twice(kSeries[0]));
    return multiply_add(series, t, pack_positive(first, second));
}

// What a lane has of a task: for each tile, its channels g (0, 1) and g + 8 (2, 3) at two neighbouring columns.
template <class G>
struct Steps
{
    float decay[G::kTiles][4];
    float drive[G::kTiles][4];
    float exponent[4]; // sums over a segment; along rows those of both columns, in 0 and 2
};

// Of one tile: x times the steps, which for bfloat16 are those of softplus, as B holds no ln 2 there.
template <typename T>
QUARTERMAP_DEVICE void make_inputs(
    Word const (&step)[2], Word const (&x)[2], Word scaled_identity, Word (&inputs)[2])
{
    if constexpr (kIsFloat16<T>)
    {
        inputs[0] = multiply<T>(step[0], x[0]);
        inputs[1] = multiply<T>(step[1], x[1]);
    }
    else
    {
        float whole[4];
        matrix_product<Float16>(whole, step[0], step[1], scaled_identity, 0.0F, 0.0F, 0.0F, 0.0F);
        inputs[0] = multiply<T>(pack<T>(whole[0], whole[1]), x[0]);
        inputs[1] = multiply<T>(pack<T>(whole[2], whole[3]), x[1]);
    }
}

// Of one tile: the decays 2^(A s) and the drives B x s from z.
template <typename T, class G>
QUARTERMAP_DEVICE void make_steps(float const (&z)[4], Parameters<G> const& parameters, Word const (&x)[2], Word b,
    Word identity, Word scaled_identity, Word summing, int j, Steps<G>& steps)
{
    Word step[2];
    Word exponent[2];
    Word drive[2];
    QUARTERMAP_UNROLL
    for (int m = 0; m < 2; ++m)
    {
        step[m] = softplus_pair(z[2 * m], z[2 * m + 1]);
        exponent[m] = multiply<Float16>(step[m], parameters.decay[m]);
    }
    make_inputs<T>(step, x, scaled_identity, drive);
    float powers[4];
    matrix_product<Float16>(powers, exponent[0], exponent[1], identity, 0.0F, 0.0F, 0.0F, 0.0F);
    matrix_product<Float16>(steps.exponent, exponent[0], exponent[1], summing, steps.exponent[0], steps.exponent[1],
        steps.exponent[2], steps.exponent[3]);
    matrix_product<T>(steps.drive[j], drive[0], drive[1], b, 0.0F, 0.0F, 0.0F, 0.0F);
    QUARTERMAP_UNROLL
    for (int i = 0; i < 4; ++i)
    {
        steps.decay[j][i] = power_of_two(powers[i]);
    }
}

} // namespace tensor_core
} // namespace quartermap
