#include "emulated_device.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <ucontext.h>

namespace quartermap
{
namespace emulation
{

Identity current{};

namespace
{

constexpr std::size_t kStackBytes = 128 * 1024;

enum class Waits
{
    kNot,
    kForBlock,
    kForWarp,
    kDone
};

struct Fibre
{
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Waits waits = Waits::kNot;
    int exchanges = 0;
};

struct Warp
{
    // A lane can be one exchange ahead of another that has not read yet.
    float values[2][32];
};

unsigned order_seed = 0;

class Block
{
public:
    Block(std::function<void()> const& body, int threads)
        : body_(body)
        , fibres_(static_cast<std::size_t>(threads))
        , warps_(static_cast<std::size_t>((threads + 31) / 32))
        , order_(static_cast<std::size_t>(threads))
    {
        for (Fibre& fibre : fibres_)
        {
            fibre.stack = std::make_unique<char[]>(kStackBytes);
        }
        std::iota(order_.begin(), order_.end(), 0);
        if (order_seed == 1)
        {
            std::reverse(order_.begin(), order_.end());
        }
        else if (order_seed > 1)
        {
            std::shuffle(order_.begin(), order_.end(), std::mt19937(order_seed));
        }
    }

    bool run();
    void wait(Waits what);
    float const* exchange(float value);

private:
    static void enter();
    bool release_if_all(std::size_t first, std::size_t last, Waits what);
    void turn(int thread);
    bool release();

    std::function<void()> const& body_;
    std::vector<Fibre> fibres_;
    std::vector<Warp> warps_;
    std::vector<int> order_;
    ucontext_t scheduler_{};
};

Block* block = nullptr;

void Block::enter()
{
    block->body_();
    block->wait(Waits::kDone);
}

void Block::wait(Waits what)
{
    Fibre& fibre = fibres_[static_cast<std::size_t>(current.thread)];
    fibre.waits = what;
    swapcontext(&fibre.context, &scheduler_);
}

float const* Block::exchange(float value)
{
    auto const thread = static_cast<std::size_t>(current.thread);
    int const turn = fibres_[thread].exchanges++ & 1;
    warps_[thread / 32].values[turn][thread % 32] = value;
    wait(Waits::kForWarp);
    return warps_[thread / 32].values[turn];
}

// Lets fibres go on if all of them wait for the same.
bool Block::release_if_all(std::size_t first, std::size_t last, Waits what)
{
    auto const begin = fibres_.begin() + static_cast<std::ptrdiff_t>(first);
    auto const end = fibres_.begin() + static_cast<std::ptrdiff_t>(last);
    if (!std::all_of(begin, end, [what](Fibre const& f) { return f.waits == what; }))
    {
        return false;
    }
    std::for_each(begin, end, [](Fibre& f) { f.waits = Waits::kNot; });
    return true;
}

// Lets a fibre run until it waits, if it may.
void Block::turn(int thread)
{
    Fibre& fibre = fibres_[static_cast<std::size_t>(thread)];
    if (fibre.waits == Waits::kNot)
    {
        current.thread = thread;
        swapcontext(&scheduler_, &fibre.context);
    }
}

// Lets those go on that have nobody left to wait for; false if there are none.
bool Block::release()
{
    bool any = false;
    for (std::size_t first = 0; first < fibres_.size(); first += 32)
    {
        any = release_if_all(first, first + 32, Waits::kForWarp) || any;
    }
    return release_if_all(0, fibres_.size(), Waits::kForBlock) || any;
}

bool Block::run()
{
    for (Fibre& fibre : fibres_)
    {
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStackBytes;
        fibre.context.uc_link = nullptr;
        fibre.waits = Waits::kNot;
        fibre.exchanges = 0;
        makecontext(&fibre.context, &Block::enter, 0);
    }
    for (;;)
    {
        for (int const thread : order_)
        {
            turn(thread);
            // Odd seeds let a warp run as far ahead of the others as barriers allow, even ones keep all side by side.
            std::size_t const first = static_cast<std::size_t>(thread) / 32 * 32;
            while (order_seed % 2 == 1 && release_if_all(first, first + 32, Waits::kForWarp))
            {
                for (std::size_t i = first; i < first + 32; ++i)
                {
                    turn(static_cast<int>(i));
                }
            }
        }
        if (std::all_of(fibres_.begin(), fibres_.end(), [](Fibre const& f) { return f.waits == Waits::kDone; }))
        {
            return true;
        }
        if (!release())
        {
            std::fprintf(stderr, "emulation: the threads of block %u wait for each other for ever\n", current.block);
            return false;
        }
    }
}

} // namespace

void wait_for_block()
{
    block->wait(Waits::kForBlock);
}

float const* exchange(float value)
{
    return block->exchange(value);
}

bool run(std::function<void()> const& body, unsigned blocks, int threads, std::int64_t shared_bytes)
{
    Block one(body, threads);
    block = &one;
    // 16 bytes past the end that nothing may write.
    auto const size = static_cast<std::size_t>(shared_bytes);
    std::vector<std::uint64_t> shared(size / 8 + 4);
    char* const memory = reinterpret_cast<char*>(shared.data());
    bool fine = true;
    for (unsigned b = 0; b < blocks && fine; ++b)
    {
        std::memset(memory, 0xff, shared.size() * 8);
        current = {0, threads, b, memory};
        fine = one.run();
        for (std::size_t i = size; i < shared.size() * 8 && fine; ++i)
        {
            if (memory[i] != static_cast<char>(0xff))
            {
                std::fprintf(stderr, "emulation: block %u wrote past its %zu bytes of shared memory\n", b, size);
                fine = false;
            }
        }
    }
    block = nullptr;
    return fine;
}

} // namespace emulation
} // namespace quartermap

// Sets the order in which threads take turns: 0 as they are numbered, 1 backwards, any other a permutation.
extern "C" __attribute__((visibility("default"))) void quartermap_emulation_order(unsigned seed)
{
    quartermap::emulation::order_seed = seed;
}
