// Vectors of floats for one instruction set. A file that includes it defines QUARTERMAP_LANES first, and compiles with
// that instruction set; everything is in an unnamed namespace, so that no two of them ever meet in the linker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define QUARTERMAP_INLINED __forceinline
#else
#define QUARTERMAP_INLINED inline __attribute__((always_inline))
#endif

namespace
{

constexpr std::size_t LANES = QUARTERMAP_LANES;

#if (defined(__GNUC__) || defined(__clang__)) && !defined(QUARTERMAP_PORTABLE_VECTORS)

using Floats = float __attribute__((vector_size(QUARTERMAP_LANES * 4)));
using Ints = std::uint32_t __attribute__((vector_size(QUARTERMAP_LANES * 4)));
// A typedef, since clang forgets the alignment of an alias.
typedef float FloatsAnywhere __attribute__((vector_size(QUARTERMAP_LANES * 4), aligned(4), may_alias));

QUARTERMAP_INLINED Floats spread(float value)
{
    return value - Floats{}; // keeps the sign of zero, which adding would not
}

QUARTERMAP_INLINED Floats load(float const* from)
{
    return *reinterpret_cast<FloatsAnywhere const*>(from);
}

QUARTERMAP_INLINED void store(float* to, Floats value)
{
    *reinterpret_cast<FloatsAnywhere*>(to) = value;
}

QUARTERMAP_INLINED Ints bits(Floats value)
{
    return reinterpret_cast<Ints>(value);
}

QUARTERMAP_INLINED Floats from_bits(Ints value)
{
    return reinterpret_cast<Floats>(value);
}

// All bits where two are equal, none elsewhere.
QUARTERMAP_INLINED Ints equal(Floats a, Floats b)
{
    return a == b;
}

#else // any C++17 compiler: arrays, and loops that it may turn into vectors

struct Floats
{
    float lane[QUARTERMAP_LANES];
};

struct Ints
{
    std::uint32_t lane[QUARTERMAP_LANES];
};

#define QUARTERMAP_EACH_LANE(type, expression)                                                                         \
    type result;                                                                                                       \
    for (std::size_t i = 0; i < LANES; ++i)                                                                            \
    {                                                                                                                  \
        result.lane[i] = expression;                                                                                   \
    }                                                                                                                  \
    return result

QUARTERMAP_INLINED Floats spread(float value)
{
    QUARTERMAP_EACH_LANE(Floats, value);
}

QUARTERMAP_INLINED Floats operator+(Floats a, Floats b)
{
    QUARTERMAP_EACH_LANE(Floats, a.lane[i] + b.lane[i]);
}

QUARTERMAP_INLINED Floats operator-(Floats a, Floats b)
{
    QUARTERMAP_EACH_LANE(Floats, a.lane[i] - b.lane[i]);
}

QUARTERMAP_INLINED Floats operator*(Floats a, Floats b)
{
    QUARTERMAP_EACH_LANE(Floats, a.lane[i] * b.lane[i]);
}

QUARTERMAP_INLINED Ints operator+(Ints a, Ints b)
{
    QUARTERMAP_EACH_LANE(Ints, a.lane[i] + b.lane[i]);
}

QUARTERMAP_INLINED Ints operator|(Ints a, Ints b)
{
    QUARTERMAP_EACH_LANE(Ints, a.lane[i] | b.lane[i]);
}

QUARTERMAP_INLINED Ints operator&(Ints a, Ints b)
{
    QUARTERMAP_EACH_LANE(Ints, a.lane[i] & b.lane[i]);
}

QUARTERMAP_INLINED Ints operator~(Ints a)
{
    QUARTERMAP_EACH_LANE(Ints, ~a.lane[i]);
}

QUARTERMAP_INLINED Ints equal(Floats a, Floats b)
{
    QUARTERMAP_EACH_LANE(Ints, a.lane[i] == b.lane[i] ? ~decltype(Ints::lane[0] + 0){0} : 0);
}

QUARTERMAP_INLINED Ints operator<<(Ints a, int places)
{
    QUARTERMAP_EACH_LANE(Ints, a.lane[i] << places);
}

#undef QUARTERMAP_EACH_LANE

QUARTERMAP_INLINED Floats load(float const* from)
{
    Floats result;
    std::memcpy(result.lane, from, sizeof(result.lane));
    return result;
}

QUARTERMAP_INLINED void store(float* to, Floats value)
{
    std::memcpy(to, value.lane, sizeof(value.lane));
}

QUARTERMAP_INLINED Ints bits(Floats value)
{
    Ints result;
    std::memcpy(result.lane, value.lane, sizeof(result.lane));
    return result;
}

QUARTERMAP_INLINED Floats from_bits(Ints value)
{
    Floats result;
    std::memcpy(result.lane, value.lane, sizeof(result.lane));
    return result;
}

#endif

// The larger of two, lane by lane; not a number where the second is none.
QUARTERMAP_INLINED Floats larger(Floats a, Floats b)
{
#if defined(QUARTERMAP_PORTABLE_VECTORS) || (defined(_MSC_VER) && !defined(__clang__))
    for (std::size_t i = 0; i < LANES; ++i)
    {
        b.lane[i] = b.lane[i] < a.lane[i] ? a.lane[i] : b.lane[i];
    }
    return b;
#elif QUARTERMAP_LANES == 16 && defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif QUARTERMAP_LANES == 8 && defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif QUARTERMAP_LANES == 4 && defined(__SSE2__)
    return _mm_max_ps(a, b);
#elif QUARTERMAP_LANES == 4 && defined(__aarch64__)
    return vmaxq_f32(a, b);
#else
    return b < a ? a : b;
#endif
}

// The larger and the smaller one of a bound and a value; a value that is not a number stays so.
QUARTERMAP_INLINED Floats at_least(float least, Floats value)
{
    return larger(spread(least), value);
}

QUARTERMAP_INLINED Floats at_most(float most, Floats value)
{
    return spread(0.0F) - larger(spread(0.0F) - spread(most), spread(0.0F) - value);
}

// Whether no lane is below a bound, or not a number.
QUARTERMAP_INLINED bool none_below(Floats value, float bound)
{
#if QUARTERMAP_LANES == 16 && defined(__AVX512F__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
    return _mm512_cmp_ps_mask(value, spread(bound), _CMP_NGE_UQ) == 0;
#elif QUARTERMAP_LANES == 8 && defined(__AVX2__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
    return _mm256_movemask_ps(_mm256_cmp_ps(value, spread(bound), _CMP_NGE_UQ)) == 0;
#elif QUARTERMAP_LANES == 4 && defined(__SSE2__) && !defined(QUARTERMAP_PORTABLE_VECTORS)
    return _mm_movemask_ps(_mm_cmpnge_ps(value, spread(bound))) == 0;
#else
    float values[LANES];
    store(values, value);
    bool all = true;
    for (std::size_t i = 0; i < LANES; ++i)
    {
        all = all && values[i] >= bound;
    }
    return all;
#endif
}

} // namespace
