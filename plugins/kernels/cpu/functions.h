// exp2 and softplus of vectors. The polynomials are minimax fits of this project, by linear programming.
#pragma once

#include "simd.h"

namespace
{

constexpr float LOG2_E = 1.4426950408889634F;

// Every function takes several vectors at once and does one operation for all of them before the next: a chain of
// dependent operations waits four cycles for each, and a processor looks ahead a few chains only.
template <std::size_t COUNT>
QUARTERMAP_INLINED void horner(Floats (&p)[COUNT], Floats const (&at)[COUNT], float coefficient)
{
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        p[i] = p[i] * at[i] + spread(coefficient);
    }
}

// t as a whole number and a fraction: 2^whole, and the fraction, at most 1/2. BOUNDED promises t <= 0; below -126 the
// power is 2^-126, since a float has no smaller normal one.
template <bool BOUNDED>
QUARTERMAP_INLINED void split_power(Floats t, Floats& scale, Floats& fraction)
{
    if (!BOUNDED)
    {
        // A power that is infinite would make a state of 0 none at all.
        t = at_most(127.0F, t);
    }
#if QUARTERMAP_LANES == 16 && defined(__AVX512F__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
    // t minus the nearest whole number, and a scaling that saturates at 0 by itself.
    fraction = _mm512_reduce_ps(t, 0x08);
    scale = _mm512_scalef_ps(spread(1.0F), t - fraction);
#else
    t = at_least(-126.0F, t);
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
    Floats const magic = spread(12582912.0F);
    Floats const whole = t + magic;
    scale = from_bits((bits(whole) << 23) + bits(spread(1.0F)));
    fraction = t - (whole - magic);
#endif
}

// 2^t = scale + growth, to 1e-7, with a growth that is exact in proportion to t where t is small.
template <bool BOUNDED, std::size_t COUNT>
QUARTERMAP_INLINED void exp2_parts(Floats const (&t)[COUNT], Floats (&scale)[COUNT], Floats (&growth)[COUNT])
{
    Floats r[COUNT];
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        split_power<BOUNDED>(t[i], scale[i], r[i]);
    }
    Floats p[COUNT];
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        p[i] = spread(0.001326472731307149F);
    }
    horner(p, r, 0.009671512991189957F);
    horner(p, r, 0.05550733581185341F);
    horner(p, r, 0.24022242426872253F);
    horner(p, r, 0.6931470036506653F);
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        growth[i] = scale[i] * (r[i] * p[i]);
    }
}

template <bool BOUNDED, std::size_t COUNT>
QUARTERMAP_INLINED void exp2_of(Floats const (&t)[COUNT], Floats (&result)[COUNT])
{
    Floats scale[COUNT];
    exp2_parts<BOUNDED>(t, scale, result);
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        result[i] = result[i] + scale[i];
    }
}

// For lanes with |t| <= 1/2: all bits of `near`, and 2^t - 1 with a small error relative to it. For the others: no bit, and
// 2^t itself.
template <bool BOUNDED, std::size_t COUNT>
QUARTERMAP_INLINED void exp2_near_one(Floats const (&t)[COUNT], Floats (&result)[COUNT], Ints (&near)[COUNT])
{
    Floats scale[COUNT];
    exp2_parts<BOUNDED>(t, scale, result);
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        near[i] = equal(scale[i], spread(1.0F));
        result[i] = result[i] + from_bits(bits(scale[i]) & ~near[i]);
    }
}

// The least t for the following.
constexpr float SMALLEST_STEP = -1.5F;

// The same for SMALLEST_STEP <= t <= 0, with a relative error of 1e-7 everywhere.
template <std::size_t COUNT>
QUARTERMAP_INLINED void exp2_minus_one_of_small(Floats const (&t)[COUNT], Floats (&result)[COUNT])
{
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        result[i] = spread(9.980273898690939e-05F);
    }
    horner(result, t, 0.0012494390830397606F);
    horner(result, t, 0.009555808268487453F);
    horner(result, t, 0.055482856929302216F);
    horner(result, t, 0.24022383987903595F);
    horner(result, t, 0.6931471228599548F);
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        result[i] = result[i] * t[i];
    }
}

// log(1 + e^v), with a small error relative to the result everywhere: max(v, 0) + log(1 + e) with e = e^-|v| <= 1.
template <std::size_t COUNT>
QUARTERMAP_INLINED void softplus(Floats (&v)[COUNT])
{
    Floats t[COUNT];
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        t[i] = from_bits(bits(v[i]) | bits(spread(-0.0F))) * spread(LOG2_E);
    }
    Floats e[COUNT];
    exp2_of<true>(t, e);
    Floats p[COUNT];
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        p[i] = spread(0.00523286173120141F);
    }
    horner(p, e, -0.02950599417090416F);
    horner(p, e, 0.07822736352682114F);
    horner(p, e, -0.13663385808467865F);
    horner(p, e, 0.191060870885849F);
    horner(p, e, -0.24843008816242218F);
    horner(p, e, 0.33319100737571716F);
    horner(p, e, -0.4999949336051941F);
    horner(p, e, 0.9999999403953552F);
    for (std::size_t i = 0; i < COUNT; ++i)
    {
        v[i] = p[i] * e[i] + at_least(0.0F, v[i]);
    }
}

} // namespace
