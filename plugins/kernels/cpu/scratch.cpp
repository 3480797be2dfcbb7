#include "scratch.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

namespace quartermap::cpu
{
namespace
{

constexpr std::size_t LINE = 64;

struct Block
{
    Block* next;
    std::size_t bytes; // behind the header
};

static_assert(sizeof(Block) <= LINE, "the header of a block fits a cache line");

// Blocks that nobody uses. Never destroyed: threads of other libraries may still scan while the process ends.
struct Shelf
{
    std::mutex mutex;
    Block* first{nullptr};
    std::size_t bytes{0};
};

Shelf& shelf()
{
    alignas(Shelf) static unsigned char place[sizeof(Shelf)];
    static Shelf* const shared = new (place) Shelf;
    return *shared;
}

// The smallest kept block that is large enough, and not so large that it would be wasted.
Block* take(std::size_t bytes)
{
    Shelf& kept = shelf();
    std::lock_guard<std::mutex> const lock(kept.mutex);
    Block** best = nullptr;
    for (Block** at = &kept.first; *at != nullptr; at = &(*at)->next)
    {
        bool const fits = (*at)->bytes >= bytes && (*at)->bytes / 4 <= bytes;
        if (fits && (best == nullptr || (*at)->bytes < (*best)->bytes))
        {
            best = at;
        }
    }
    if (best == nullptr)
    {
        return nullptr;
    }
    Block* const found = *best;
    *best = found->next;
    kept.bytes -= found->bytes;
    return found;
}

// Keeps a block, or says that it has to be given back.
bool keep(Block* block)
{
    Shelf& kept = shelf();
    std::lock_guard<std::mutex> const lock(kept.mutex);
    if (kept.bytes + block->bytes > KEPT_BYTES)
    {
        return false;
    }
    block->next = kept.first;
    kept.first = block;
    kept.bytes += block->bytes;
    return true;
}

float* behind(Block* block)
{
    std::uintptr_t const start = reinterpret_cast<std::uintptr_t>(block) + sizeof(Block);
    return reinterpret_cast<float*>((start + LINE - 1) / LINE * LINE);
}

} // namespace

Scratch::Scratch(std::size_t floats)
{
    std::size_t const bytes = (floats * sizeof(float) + LINE - 1) / LINE * LINE;
    Block* block = take(bytes);
    if (block == nullptr)
    {
        block = static_cast<Block*>(std::malloc(sizeof(Block) + LINE + bytes));
        if (block == nullptr)
        {
            return;
        }
        block->bytes = bytes;
    }
    mBlock = block;
    mData = behind(block);
}

Scratch::~Scratch()
{
    if (mBlock != nullptr && !keep(static_cast<Block*>(mBlock)))
    {
        std::free(mBlock);
    }
}

} // namespace quartermap::cpu
