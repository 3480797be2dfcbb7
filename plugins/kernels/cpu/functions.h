// exp2 and softplus of vectors. The polynomials are minimax fits of this project, by linear programming.
#pragma once

#include "simd.h"

namespace
{

constexpr float LOG2_E = 1.4426950408889634F;

// (2^r - 1) / r for |r| <= 1/2, so that 2^r has an error of 1e-7, in proportion to r where r is small.
QUARTERMAP_INLINED Floats growth_of_fraction(Floats r)
{
    Floats p = spread(0.001326472731307149F);
    p = p * r + spread(0.009671512991189957F);
    p = p * r + spread(0.05550733581185341F);
    p = p * r + spread(0.24022242426872253F);
    return p * r + spread(0.6931470036506653F);
}

// t as a whole number and a fraction: 2^whole, and the fraction, at most 1/2. BOUNDED promises t <= 0; below -126 the
// power is 2^-126, since a float has no smaller normal one.
struct Power
{
    Floats scale;
    Floats fraction;
};

template <bool BOUNDED>
QUARTERMAP_INLINED Power power_of(Floats t)
{
#if QUARTERMAP_LANES == 16 && defined(__AVX512F__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
    // t minus the nearest whole number, and a scaling that saturates by itself.
    Floats const fraction = _mm512_reduce_ps(t, 0x08);
    return {_mm512_scalef_ps(spread(1.0F), t - fraction), fraction};
#else
    t = at_least(-126.0F, t);
    if (!BOUNDED)
    {
        t = at_most(127.0F, t);
    }
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
    Floats const magic = spread(12582912.0F);
    Floats const whole = t + magic;
    return {from_bits((bits(whole) << 23) + bits(spread(1.0F))), t - (whole - magic)};
#endif
}

template <bool BOUNDED>
QUARTERMAP_INLINED Floats exp2_of(Floats t)
{
    Power const power = power_of<BOUNDED>(t);
    return power.scale * (power.fraction * growth_of_fraction(power.fraction)) + power.scale;
}

// 2^t - 1, with a small error relative to the result where t is small.
template <bool BOUNDED>
QUARTERMAP_INLINED Floats exp2_minus_one(Floats t)
{
    Power const power = power_of<BOUNDED>(t);
    return power.scale * (power.fraction * growth_of_fraction(power.fraction)) + (power.scale - spread(1.0F));
}

// The least t for the following.
constexpr float SMALLEST_STEP = -1.5F;

// The same for SMALLEST_STEP <= t <= 0, with a relative error of 1e-7 everywhere.
QUARTERMAP_INLINED Floats exp2_minus_one_of_small(Floats t)
{
    Floats p = spread(9.980273898690939e-05F);
    p = p * t + spread(0.0012494390830397606F);
    p = p * t + spread(0.009555808268487453F);
    p = p * t + spread(0.055482856929302216F);
    p = p * t + spread(0.24022383987903595F);
    p = p * t + spread(0.6931471228599548F);
    return p * t;
}

// log(1 + e^v), with a small error relative to the result everywhere: max(v, 0) + log(1 + e) with e = e^-|v| <= 1.
QUARTERMAP_INLINED Floats softplus_of(Floats v)
{
    Floats const negative = from_bits(bits(v) | bits(spread(-0.0F)));
    Floats const e = exp2_of<true>(negative * spread(LOG2_E));
    Floats p = spread(0.00523286173120141F);
    p = p * e + spread(-0.02950599417090416F);
    p = p * e + spread(0.07822736352682114F);
    p = p * e + spread(-0.13663385808467865F);
    p = p * e + spread(0.191060870885849F);
    p = p * e + spread(-0.24843008816242218F);
    p = p * e + spread(0.33319100737571716F);
    p = p * e + spread(-0.4999949336051941F);
    p = p * e + spread(0.9999999403953552F);
    return p * e + at_least(0.0F, v);
}

} // namespace
