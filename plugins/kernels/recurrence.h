// The arithmetic of the scan at one position.
#pragma once

#include <math.h>

#include "device.h"

namespace quartermap
{

constexpr float kLog2E = 1.4426950408889634F;

// softplus(v) = max(v, 0) + log1p(exp(-|v|)), with a relative error of 1e-6 where |v| < 12.
//
// Time steps are small (1e-3 to 0.1), where log(1 + e) has lost most of its digits, and log1pf costs twice the
// instructions of this: log1p(e) = 2 atanh(s) with s = e / (2 + e), at most 1/3, so that five terms are enough.
QUARTERMAP_DEVICE float softplus(float v)
{
    float const e = power_of_two(-kLog2E * fabsf(v));
    float const s = e * reciprocal(2.0F + e);
    float const z = s * s;
    // atanh(s) / s on 0 <= z <= 1/9; the least largest error, 4.5e-9.
    float series = 0.14005995F;
    series = series * z + 0.14000903F;
    series = series * z + 0.20010763F;
    series = series * z + 0.33333210F;
    series = series * z + 1.0F;
    return fmaxf(v, 0.0F) + 2.0F * (s * series);
}

// One step of h = a h + b as a map; maps compose, and that is all a parallel scan needs. Only decays are multiplied, and
// never divided, so a product that underflows is a state that is truly forgotten.
struct alignas(8) Affine
{
    float a;
    float b;
};

// First `earlier`, then `later`.
QUARTERMAP_DEVICE Affine compose(Affine earlier, Affine later)
{
    return {later.a * earlier.a, later.a * earlier.b + later.b};
}

} // namespace quartermap
