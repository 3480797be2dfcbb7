// machine.h on a device: one instruction each, from compute capability 8.0 on.
#pragma once

namespace quartermap
{
namespace tensor_core
{

// Pairs ---------------------------------------------------------------------------------------------------------------

template <typename T>
QUARTERMAP_DEVICE Word pack(float low, float high);

template <>
QUARTERMAP_DEVICE Word pack<Float16>(float low, float high)
{
    Word result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

template <>
QUARTERMAP_DEVICE Word pack<BFloat16>(float low, float high)
{
    Word result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// max(v, 0) of both, in float16.
QUARTERMAP_DEVICE Word pack_positive(float low, float high)
{
    Word result;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// a b + c of pairs in float16.
QUARTERMAP_DEVICE Word multiply_add(Word a, Word b, Word c)
{
    Word result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

template <typename T>
QUARTERMAP_DEVICE Word multiply(Word a, Word b);

template <>
QUARTERMAP_DEVICE Word multiply<Float16>(Word a, Word b)
{
    Word result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

template <>
QUARTERMAP_DEVICE Word multiply<BFloat16>(Word a, Word b)
{
    Word result; // adding -0 changes nothing, and there is no product alone before compute capability 9.0
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
    return result;
}

// `seen`, with NaN in the place of each value that is not finite.
template <typename T>
QUARTERMAP_DEVICE Word watch(Word seen, Word values);

template <>
QUARTERMAP_DEVICE Word watch<Float16>(Word seen, Word values)
{
    return multiply_add(values, 0u, seen);
}

template <>
QUARTERMAP_DEVICE Word watch<BFloat16>(Word seen, Word values)
{
    Word result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(values), "r"(0u), "r"(seen));
    return result;
}

template <typename T>
QUARTERMAP_DEVICE float low_of(Word pair);

template <>
QUARTERMAP_DEVICE float low_of<Float16>(Word pair)
{
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}

template <>
QUARTERMAP_DEVICE float low_of<BFloat16>(Word pair)
{
    return __uint_as_float(pair << 16);
}

template <typename T>
QUARTERMAP_DEVICE float high_of(Word pair);

template <>
QUARTERMAP_DEVICE float high_of<Float16>(Word pair)
{
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

template <>
QUARTERMAP_DEVICE float high_of<BFloat16>(Word pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

// Products of matrices ------------------------------------------------------------------------------------------------
//
// Thread (g = lane / 4, q = lane % 4) holds of the result d its rows g and g + 8 at the columns 2q and 2q + 1, of the
// left factor its rows g and g + 8 at the columns 2q and 2q + 1, and of the right factor its rows 2q and 2q + 1 at the
// column g.

// d = a b + (c0, c0', c1, c1'), over 8.
template <typename T>
QUARTERMAP_DEVICE void matrix_product(float (&d)[4], Word a0, Word a1, Word b, float c0, float c1, float c2, float c3);

template <>
QUARTERMAP_DEVICE void matrix_product<Float16>(
    float (&d)[4], Word a0, Word a1, Word b, float c0, float c1, float c2, float c3)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

template <>
QUARTERMAP_DEVICE void matrix_product<BFloat16>(
    float (&d)[4], Word a0, Word a1, Word b, float c0, float c1, float c2, float c3)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// d += a b, over 16: a and b are two factors each of the kind above.
template <typename T>
QUARTERMAP_DEVICE void add_matrix_product(
    float (&d)[4], Word const (&a)[2], Word const (&a_next)[2], Word b, Word b_next);

template <>
QUARTERMAP_DEVICE void add_matrix_product<Float16>(
    float (&d)[4], Word const (&a)[2], Word const (&a_next)[2], Word b, Word b_next)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a_next[0]), "r"(a_next[1]), "r"(b), "r"(b_next));
}

template <>
QUARTERMAP_DEVICE void add_matrix_product<BFloat16>(
    float (&d)[4], Word const (&a)[2], Word const (&a_next)[2], Word b, Word b_next)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a_next[0]), "r"(a_next[1]), "r"(b), "r"(b_next));
}

// sum += a b, over 8, in float16: sum[0] is row g, sum[1] row g + 8.
QUARTERMAP_DEVICE void add_matrix_product_16(Word (&sum)[2], Word a0, Word a1, Word b)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"
        : "+r"(sum[0]), "+r"(sum[1])
        : "r"(a0), "r"(a1), "r"(b));
}

// Right factors from rows of 8 values in shared memory, of which lane 8 i + r names row r of factor i.
QUARTERMAP_DEVICE void load_factors(Shared row, Word (&factors)[1])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(factors[0]) : "r"(row));
}

QUARTERMAP_DEVICE void load_factors(Shared row, Word (&factors)[2])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(factors[0]), "=r"(factors[1])
                 : "r"(row));
}

QUARTERMAP_DEVICE void load_factors(Shared row, Word (&factors)[4])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(factors[0]), "=r"(factors[1]), "=r"(factors[2]), "=r"(factors[3])
                 : "r"(row));
}

// Shared memory -------------------------------------------------------------------------------------------------------

QUARTERMAP_DEVICE Shared shared_begin()
{
    return static_cast<Shared>(__cvta_generic_to_shared(shared_memory()));
}

QUARTERMAP_DEVICE Word read_shared(Shared at)
{
    Word value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(at));
    return value;
}

QUARTERMAP_DEVICE float read_shared_float(Shared at)
{
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at));
    return value;
}

QUARTERMAP_DEVICE void read_shared(Shared at, float& first, float& second)
{
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(first), "=f"(second) : "r"(at));
}

QUARTERMAP_DEVICE void read_shared(Shared at, Word (&values)[2])
{
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(values[0]), "=r"(values[1]) : "r"(at));
}

QUARTERMAP_DEVICE void read_shared(Shared at, Word (&values)[4])
{
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(at));
}

// The lower half alone.
QUARTERMAP_DEVICE void write_shared_half(Shared at, Word value)
{
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(static_cast<unsigned short>(value)) : "memory");
}

QUARTERMAP_DEVICE void write_shared(Shared at, Word value)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}

QUARTERMAP_DEVICE void write_shared(Shared at, float value)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(value) : "memory");
}

QUARTERMAP_DEVICE void write_shared(Shared at, float first, float second)
{
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(at), "f"(first), "f"(second) : "memory");
}

QUARTERMAP_DEVICE void write_shared(Shared at, Word const (&values)[2])
{
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(at), "r"(values[0]), "r"(values[1]) : "memory");
}

QUARTERMAP_DEVICE void write_shared(Shared at, Word const (&values)[4])
{
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(values[0]), "r"(values[1]), "r"(values[2]),
                 "r"(values[3])
                 : "memory");
}

// Global memory -------------------------------------------------------------------------------------------------------

// Memory that no thread of the launch writes; one value, in the lower half.
template <typename T>
QUARTERMAP_DEVICE Word load_half(T const* from)
{
    return __ldg(reinterpret_cast<unsigned short const*>(from));
}

template <typename T>
QUARTERMAP_DEVICE void load_words(T const* from, Word (&values)[1])
{
    values[0] = __ldg(reinterpret_cast<Word const*>(from));
}

template <typename T>
QUARTERMAP_DEVICE void load_words(T const* from, Word (&values)[2])
{
    uint2 const found = __ldg(reinterpret_cast<uint2 const*>(from));
    values[0] = found.x;
    values[1] = found.y;
}

template <typename T>
QUARTERMAP_DEVICE void load_words(T const* from, Word (&values)[4])
{
    uint4 const found = __ldg(reinterpret_cast<uint4 const*>(from));
    values[0] = found.x;
    values[1] = found.y;
    values[2] = found.z;
    values[3] = found.w;
}

// What this block has written.
template <typename T>
QUARTERMAP_DEVICE Word load_own(T const* from)
{
    Word value;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

template <typename T>
QUARTERMAP_DEVICE void load_own(T const* from, Word (&values)[4])
{
    asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "l"(from)
                 : "memory");
}

template <typename T>
QUARTERMAP_DEVICE void store_half(T* to, Word value)
{
    *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(value);
}

template <typename T>
QUARTERMAP_DEVICE void store_words(T* to, Word const (&values)[1])
{
    *reinterpret_cast<Word*>(to) = values[0];
}

template <typename T>
QUARTERMAP_DEVICE void store_words(T* to, Word const (&values)[2])
{
    *reinterpret_cast<uint2*>(to) = make_uint2(values[0], values[1]);
}

template <typename T>
QUARTERMAP_DEVICE void store_words(T* to, Word const (&values)[4])
{
    *reinterpret_cast<uint4*>(to) = make_uint4(values[0], values[1], values[2], values[3]);
}

// From one block to another: what was stored before `tell` is seen after `wait_until_told`.
QUARTERMAP_DEVICE void tell(std::uint32_t* flag)
{
    __threadfence();
    *const_cast<std::uint32_t volatile*>(flag) = 1u;
}

template <Barrier kName>
QUARTERMAP_DEVICE void wait_until_told(std::uint32_t* flag)
{
    while (*const_cast<std::uint32_t volatile*>(flag) == 0u)
    {
    }
    __threadfence();
}

// Past the first cache, which does not see what other blocks store.
QUARTERMAP_DEVICE float load_told(float const* from)
{
    return __ldcg(from);
}

// Barriers ------------------------------------------------------------------------------------------------------------

template <Barrier kName>
QUARTERMAP_DEVICE void wait_for_warp()
{
    __syncwarp();
}

// For `threads` threads, whole warps, that name the same number from 1 to 15.
template <Barrier kName>
QUARTERMAP_DEVICE void wait_for_team(int number, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <Barrier kName>
QUARTERMAP_DEVICE void wait_for_block()
{
    __syncthreads();
}

// Waits for the block, and says whether it is so for any of its threads.
template <Barrier kName>
QUARTERMAP_DEVICE bool any_of_block(bool so)
{
    return __syncthreads_or(so ? 1 : 0) != 0;
}

} // namespace tensor_core
} // namespace quartermap
