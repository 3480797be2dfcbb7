// Numbers below the smallest normal one count as zero for the time of a task: states decay into them, and a processor
// takes a hundred times as long for each.
#pragma once

#include <cstdint>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace quartermap::cpu
{

class DenormalsAreZero
{
public:
    DenormalsAreZero()
        : mBefore(read())
    {
        write(mBefore | ZEROS);
    }

    ~DenormalsAreZero()
    {
        write(mBefore);
    }

    DenormalsAreZero(DenormalsAreZero const&) = delete;
    DenormalsAreZero& operator=(DenormalsAreZero const&) = delete;

private:
#if defined(__SSE2__) || defined(_M_X64)
    using Word = unsigned int;
    static constexpr Word ZEROS = 0x8040; // FTZ and DAZ
    static Word read()
    {
        return _mm_getcsr();
    }
    static void write(Word word)
    {
        _mm_setcsr(word);
    }
#elif defined(__aarch64__) && defined(__GNUC__)
    using Word = std::uint64_t;
    static constexpr Word ZEROS = std::uint64_t{1} << 24; // FZ
    static Word read()
    {
        Word word;
        __asm__ volatile("mrs %0, fpcr" : "=r"(word));
        return word;
    }
    static void write(Word word)
    {
        __asm__ volatile("msr fpcr, %0" : : "r"(word));
    }
#else
    using Word = unsigned int;
    static constexpr Word ZEROS = 0;
    static Word read()
    {
        return 0;
    }
    static void write(Word)
    {
    }
#endif
    Word mBefore;
};

} // namespace quartermap::cpu
