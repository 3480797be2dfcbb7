// tensor_core/machine.h on the host: a product of matrices is an exchange between the fibres of a warp; shared memory
// is checked for bounds, alignment and races; a barrier can be left out by its name.
#pragma once

#include <array>
#include <cstring>

#include "emulated_device.h"

namespace quartermap
{
namespace tensor_core
{

// Pairs ---------------------------------------------------------------------------------------------------------------

template <typename T>
inline Word half_of(float value)
{
    T stored;
    store(value, stored);
    return stored.bits;
}

template <typename T>
inline Word pack(float low, float high)
{
    return half_of<T>(low) | half_of<T>(high) << 16;
}

template <typename T>
inline float low_of(Word pair)
{
    return to_float(T{static_cast<std::uint16_t>(pair)});
}

template <typename T>
inline float high_of(Word pair)
{
    return to_float(T{static_cast<std::uint16_t>(pair >> 16)});
}

// NaN stays NaN, as on a device.
inline Word pack_positive(float low, float high)
{
    return pack<Float16>(low < 0.0F ? 0.0F : low, high < 0.0F ? 0.0F : high);
}

// Rounded once: a product of two 16-bit values, and what is added, fit a double.
inline Word multiply_add(Word a, Word b, Word c)
{
    auto const sum = [](float x, float y, float z) { return static_cast<float>(static_cast<double>(x) * y + z); };
    return pack<Float16>(sum(low_of<Float16>(a), low_of<Float16>(b), low_of<Float16>(c)),
        sum(high_of<Float16>(a), high_of<Float16>(b), high_of<Float16>(c)));
}

template <typename T>
inline Word multiply(Word a, Word b)
{
    return pack<T>(low_of<T>(a) * low_of<T>(b), high_of<T>(a) * high_of<T>(b));
}

template <typename T>
inline Word watch(Word seen, Word values)
{
    return pack<T>(
        low_of<T>(values) * 0.0F + low_of<T>(seen), high_of<T>(values) * 0.0F + high_of<T>(seen));
}

// Products of matrices ------------------------------------------------------------------------------------------------

// Adds to `d` what the lanes of the warp hold: of the left factor words `a` and `a + 1`, of the right one word `b`.
template <typename T>
inline void add_products(emulation::Words const* lanes, int a, int b, double (&d)[4])
{
    int const g = thread_index() % 32 / 4;
    int const q = thread_index() % 4;
    for (int i = 0; i < 4; ++i)
    {
        for (int k = 0; k < 8; ++k)
        {
            Word const left = lanes[4 * g + k / 2].values[a + i / 2];
            Word const right = lanes[4 * (2 * q + i % 2) + k / 2].values[b];
            bool const odd = k % 2 != 0;
            d[i] += static_cast<double>(odd ? high_of<T>(left) : low_of<T>(left))
                * (odd ? high_of<T>(right) : low_of<T>(right));
        }
    }
}

template <typename T>
inline void matrix_product(float (&d)[4], Word a0, Word a1, Word b, float c0, float c1, float c2, float c3)
{
    double sum[4] = {c0, c1, c2, c3};
    add_products<T>(emulation::exchange({{a0, a1, b}}), 0, 2, sum);
    std::copy(sum, sum + 4, d);
}

template <typename T>
inline void add_matrix_product(float (&d)[4], Word const (&a)[2], Word const (&a_next)[2], Word b, Word b_next)
{
    double sum[4] = {d[0], d[1], d[2], d[3]};
    emulation::Words const* const lanes = emulation::exchange({{a[0], a[1], a_next[0], a_next[1], b, b_next}});
    add_products<T>(lanes, 0, 4, sum);
    add_products<T>(lanes, 2, 5, sum);
    std::copy(sum, sum + 4, d);
}

inline void add_matrix_product_16(Word (&sum)[2], Word a0, Word a1, Word b)
{
    double whole[4]
        = {low_of<Float16>(sum[0]), high_of<Float16>(sum[0]), low_of<Float16>(sum[1]), high_of<Float16>(sum[1])};
    add_products<Float16>(emulation::exchange({{a0, a1, b}}), 0, 2, whole);
    for (int m = 0; m < 2; ++m)
    {
        sum[m] = pack<Float16>(static_cast<float>(whole[2 * m]), static_cast<float>(whole[2 * m + 1]));
    }
}

// Shared memory -------------------------------------------------------------------------------------------------------

inline Shared shared_begin()
{
    return 0;
}

template <typename T>
inline T read_shared_as(Shared at)
{
    T value;
    std::memcpy(&value, emulation::read_shared(at, sizeof value), sizeof value);
    return value;
}

template <typename T>
inline void write_shared_as(Shared at, T const& value)
{
    unsigned char bytes[sizeof value];
    std::memcpy(bytes, &value, sizeof value);
    emulation::write_shared(at, sizeof value, bytes);
}

inline Word read_shared(Shared at)
{
    return read_shared_as<Word>(at);
}

inline float read_shared_float(Shared at)
{
    return read_shared_as<float>(at);
}

inline void read_shared(Shared at, float& first, float& second)
{
    auto const both = read_shared_as<std::array<float, 2>>(at);
    first = both[0];
    second = both[1];
}

template <int kCount>
inline void read_shared(Shared at, Word (&values)[kCount])
{
    auto const found = read_shared_as<std::array<Word, kCount>>(at);
    std::copy(found.begin(), found.end(), values);
}

inline void write_shared_half(Shared at, Word value)
{
    write_shared_as(at, static_cast<std::uint16_t>(value));
}

inline void write_shared(Shared at, Word value)
{
    write_shared_as(at, value);
}

inline void write_shared(Shared at, float value)
{
    write_shared_as(at, value);
}

inline void write_shared(Shared at, float first, float second)
{
    write_shared_as(at, std::array<float, 2>{first, second});
}

template <int kCount>
inline void write_shared(Shared at, Word const (&values)[kCount])
{
    std::array<Word, kCount> all;
    std::copy(values, values + kCount, all.begin());
    write_shared_as(at, all);
}

// A row is read by the lane that gets a value of it, and has to begin where ldmatrix lets it.
template <int kCount>
inline void load_factors(Shared row, Word (&factors)[kCount])
{
    emulation::Words const* const lanes = emulation::exchange({{row}});
    int const g = thread_index() % 32 / 4;
    int const q = thread_index() % 4;
    for (int i = 0; i < kCount; ++i)
    {
        Word pair = 0;
        for (int e = 0; e < 2; ++e)
        {
            Shared const from = lanes[8 * i + 2 * q + e].values[0];
            emulation::require(from % 16 == 0, "rows of a factor have to begin at multiples of 16 bytes");
            pair |= static_cast<Word>(read_shared_as<std::uint16_t>(from + 2 * static_cast<Shared>(g))) << (16 * e);
        }
        factors[i] = pair;
    }
}

// Global memory -------------------------------------------------------------------------------------------------------

template <typename T>
inline Word load_half(T const* from)
{
    return from->bits;
}

template <typename T, int kCount>
inline void load_words(T const* from, Word (&values)[kCount])
{
    emulation::require(reinterpret_cast<std::uintptr_t>(from) % sizeof values == 0, "words read at an odd address");
    std::memcpy(values, from, sizeof values);
}

template <typename T>
inline Word load_own(T const* from)
{
    Word value[1];
    load_words(from, value);
    return value[0];
}

template <typename T>
inline void load_own(T const* from, Word (&values)[4])
{
    load_words(from, values);
}

template <typename T>
inline void store_half(T* to, Word value)
{
    to->bits = static_cast<std::uint16_t>(value);
}

template <typename T, int kCount>
inline void store_words(T* to, Word const (&values)[kCount])
{
    emulation::require(reinterpret_cast<std::uintptr_t>(to) % sizeof values == 0, "words stored at an odd address");
    std::memcpy(to, values, sizeof values);
}

inline void tell(std::uint32_t* flag)
{
    *flag = 1;
}

inline float load_told(float const* from)
{
    return *from;
}

// Barriers ------------------------------------------------------------------------------------------------------------

template <Barrier kName>
inline void wait_until_told(std::uint32_t* flag)
{
    while (*flag == 0 && !emulation::left_out(static_cast<int>(kName)))
    {
        emulation::pause();
    }
}

template <Barrier kName>
inline void wait_for_warp()
{
    if (!emulation::left_out(static_cast<int>(kName)))
    {
        emulation::wait_for_warp();
    }
}

template <Barrier kName>
inline void wait_for_team(int number, int threads)
{
    if (!emulation::left_out(static_cast<int>(kName)))
    {
        emulation::wait_for_team(number, threads);
    }
}

template <Barrier kName>
inline void wait_for_block()
{
    if (!emulation::left_out(static_cast<int>(kName)))
    {
        emulation::wait_for_block();
    }
}

template <Barrier kName>
inline bool any_of_block(bool so)
{
    return emulation::vote(so, !emulation::left_out(static_cast<int>(kName)));
}

} // namespace tensor_core
} // namespace quartermap
