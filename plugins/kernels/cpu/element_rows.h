// Rows of a map, turned into tiles: from (channels, L) in any element type to (L, lanes) in float32, and back.
#pragma once

#include <type_traits>

#include "simd.h"

namespace
{

struct Float16
{
    std::uint16_t bits;
};

struct BFloat16
{
    std::uint16_t bits;
};

QUARTERMAP_INLINED float as_float(std::uint32_t pattern)
{
    float value;
    std::memcpy(&value, &pattern, sizeof(value));
    return value;
}

QUARTERMAP_INLINED std::uint32_t as_pattern(float value)
{
    std::uint32_t pattern;
    std::memcpy(&pattern, &value, sizeof(pattern));
    return pattern;
}

QUARTERMAP_INLINED float to_float(float value)
{
    return value;
}

QUARTERMAP_INLINED float to_float(double value)
{
    return static_cast<float>(value);
}

QUARTERMAP_INLINED float to_float(BFloat16 value)
{
    return as_float(static_cast<std::uint32_t>(value.bits) << 16);
}

QUARTERMAP_INLINED float to_float(Float16 value)
{
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    std::uint32_t const sign = static_cast<std::uint32_t>(value.bits & 0x8000U) << 16;
    std::uint32_t const rest = value.bits & 0x7fffU;
    if (rest >= 0x7c00U) // infinite, or not a number
    {
        return as_float(sign | 0x7f800000U | ((rest & 0x3ffU) << 13));
    }
    if (rest < 0x400U) // denormal, and zero: whole multiples of 2^-24, exact in float32
    {
        float const magnitude = static_cast<float>(rest) * 5.9604644775390625e-8F;
        return sign != 0 ? -magnitude : magnitude;
    }
    return as_float(sign | ((rest << 13) + 0x38000000U));
#endif
}

template <typename T>
QUARTERMAP_INLINED T from_float(float value)
{
    return static_cast<T>(value);
}

// Rounds to the nearest, and to even between two; what is not a number stays so.
template <>
QUARTERMAP_INLINED BFloat16 from_float<BFloat16>(float value)
{
    std::uint32_t const pattern = as_pattern(value);
    if ((pattern & 0x7fffffffU) > 0x7f800000U)
    {
        return {static_cast<std::uint16_t>((pattern >> 16) | 0x40U)};
    }
    return {static_cast<std::uint16_t>((pattern + 0x7fffU + ((pattern >> 16) & 1U)) >> 16)};
}

template <>
QUARTERMAP_INLINED Float16 from_float<Float16>(float value)
{
#if defined(__F16C__)
    return {static_cast<std::uint16_t>(_cvtss_sh(value, 0))};
#else
    std::uint32_t const pattern = as_pattern(value);
    std::uint32_t const sign = (pattern >> 16) & 0x8000U;
    std::uint32_t const rest = pattern & 0x7fffffffU;
    if (rest > 0x7f800000U)
    {
        return {static_cast<std::uint16_t>(sign | 0x7e00U)};
    }
    if (rest >= 0x477ff000U) // rounds to 2^16, which is not there any more
    {
        return {static_cast<std::uint16_t>(sign | 0x7c00U)};
    }
    if (rest < 0x38800000U) // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits, rounded
    {
        std::uint32_t const sum = as_pattern(as_float(rest) + 0.5F);
        return {static_cast<std::uint16_t>(sign | (sum - 0x3f000000U))};
    }
    std::uint32_t const rounded = rest - 0x38000000U + 0xfffU + ((rest >> 13) & 1U);
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
#endif
}

template <typename T>
QUARTERMAP_INLINED Floats load_row(T const* from)
{
    float values[LANES];
    for (std::size_t i = 0; i < LANES; ++i)
    {
        values[i] = to_float(from[i]);
    }
    return load(values);
}

QUARTERMAP_INLINED Floats load_row(float const* from)
{
    return load(from);
}

#if QUARTERMAP_LANES == 16 && defined(__AVX512F__)
QUARTERMAP_INLINED Floats load_row(Float16 const* from)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(from)));
}
#elif QUARTERMAP_LANES == 8 && defined(__F16C__)
QUARTERMAP_INLINED Floats load_row(Float16 const* from)
{
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from)));
}
#endif

template <typename T>
QUARTERMAP_INLINED void store_row(T* to, Floats value)
{
    float values[LANES];
    store(values, value);
    for (std::size_t i = 0; i < LANES; ++i)
    {
        to[i] = from_float<T>(values[i]);
    }
}

QUARTERMAP_INLINED void store_row(float* to, Floats value)
{
    store(to, value);
}

// A square of LANES rows of LANES numbers, turned over in registers.
QUARTERMAP_INLINED void transpose(Floats* row)
{
#if defined(QUARTERMAP_PORTABLE_VECTORS) || (defined(_MSC_VER) && !defined(__clang__))
    float in[LANES][LANES];
    float out[LANES][LANES];
    std::memcpy(in, row, sizeof(in));
    for (std::size_t i = 0; i < LANES; ++i)
    {
        for (std::size_t j = 0; j < LANES; ++j)
        {
            out[j][i] = in[i][j];
        }
    }
    std::memcpy(static_cast<void*>(row), out, sizeof(out));
#elif QUARTERMAP_LANES == 16 && defined(__AVX512F__)
    __m512 pair[16];
    __m512d quad[16];
    for (int i = 0; i < 8; ++i)
    {
        pair[2 * i] = _mm512_unpacklo_ps(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm512_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
    {
        for (int j = 0; j < 2; ++j)
        {
            __m512d const low = _mm512_castps_pd(pair[4 * i + j]);
            __m512d const high = _mm512_castps_pd(pair[4 * i + j + 2]);
            quad[4 * i + 2 * j] = _mm512_unpacklo_pd(low, high);
            quad[4 * i + 2 * j + 1] = _mm512_unpackhi_pd(low, high);
        }
    }
    for (int i = 0; i < 4; ++i)
    {
        __m512 const a = _mm512_castpd_ps(quad[i]);
        __m512 const b = _mm512_castpd_ps(quad[4 + i]);
        __m512 const c = _mm512_castpd_ps(quad[8 + i]);
        __m512 const d = _mm512_castpd_ps(quad[12 + i]);
        __m512 const even_low = _mm512_shuffle_f32x4(a, b, 0x88);
        __m512 const odd_low = _mm512_shuffle_f32x4(a, b, 0xdd);
        __m512 const even_high = _mm512_shuffle_f32x4(c, d, 0x88);
        __m512 const odd_high = _mm512_shuffle_f32x4(c, d, 0xdd);
        row[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        row[8 + i] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        row[4 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        row[12 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
#elif QUARTERMAP_LANES == 8 && defined(__AVX2__)
    __m256 pair[8];
    __m256 quad[8];
    for (int i = 0; i < 4; ++i)
    {
        pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i)
    {
        for (int j = 0; j < 2; ++j)
        {
            quad[4 * i + 2 * j] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + j + 2], 0x44);
            quad[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i)
    {
        row[i] = _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x20);
        row[4 + i] = _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x31);
    }
#elif QUARTERMAP_LANES == 4 && defined(__SSE2__)
    __m128 a = row[0];
    __m128 b = row[1];
    __m128 c = row[2];
    __m128 d = row[3];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    row[0] = a;
    row[1] = b;
    row[2] = c;
    row[3] = d;
#elif QUARTERMAP_LANES == 4 && defined(__aarch64__)
    float32x4x2_t const low = vtrnq_f32(row[0], row[1]);
    float32x4x2_t const high = vtrnq_f32(row[2], row[3]);
    row[0] = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
    row[1] = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
    row[2] = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
    row[3] = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
#else
    for (std::size_t i = 0; i < LANES; ++i)
    {
        for (std::size_t j = 0; j < i; ++j)
        {
            float const above = row[j][i];
            row[j][i] = row[i][j];
            row[i][j] = above;
        }
    }
#endif
}

// Columns [begin, end) of `count` rows become rows of `out`: element l of rows[c] goes to out[l * stride + c]. `width`
// columns are written, a multiple of 4 and at most LANES; those from `count` on are zero.
template <typename T>
void gather_rows(T const* const* rows, std::size_t count, std::size_t begin, std::size_t end, float* out,
    std::size_t stride, std::size_t width)
{
    std::size_t l = begin;
    for (; l + LANES <= end; l += LANES)
    {
        Floats square[LANES];
        for (std::size_t c = 0; c < LANES; ++c)
        {
            square[c] = c < count ? load_row(rows[c] + l) : spread(0.0F);
        }
        transpose(square);
        float* to = out + l * stride;
        if (width == LANES)
        {
            for (std::size_t i = 0; i < LANES; ++i)
            {
                store(to + i * stride, square[i]);
            }
        }
        else
        {
            for (std::size_t i = 0; i < LANES; ++i)
            {
                float values[LANES];
                store(values, square[i]);
                for (std::size_t c = 0; c < width; c += 4)
                {
                    std::memcpy(to + i * stride + c, values + c, 4 * sizeof(float));
                }
            }
        }
    }
    for (; l < end; ++l)
    {
        for (std::size_t c = 0; c < width; ++c)
        {
            out[l * stride + c] = c < count ? to_float(rows[c][l]) : 0.0F;
        }
    }
}

// The inverse: rows [begin, end) of a tile become columns of `count` rows.
template <typename T>
void scatter_rows(float const* tile, std::size_t begin, std::size_t end, T* rows, std::size_t pitch, std::size_t count)
{
    std::size_t l = begin;
    for (; l + LANES <= end; l += LANES)
    {
        Floats square[LANES];
        for (std::size_t i = 0; i < LANES; ++i)
        {
            square[i] = load(tile + (l + i) * LANES);
        }
        transpose(square);
        for (std::size_t c = 0; c < count; ++c)
        {
            store_row(rows + c * pitch + l, square[c]);
        }
    }
    for (; l < end; ++l)
    {
        for (std::size_t c = 0; c < count; ++c)
        {
            rows[c * pitch + l] = from_float<T>(tile[l * LANES + c]);
        }
    }
}

} // namespace
