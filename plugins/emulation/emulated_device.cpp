#include "emulated_device.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#include "shared_races.h"

namespace quartermap
{
namespace emulation
{

Identity current{};

namespace
{

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr int kMostIdleRounds = 1000;
constexpr int kMostTeams = 16; // as CUDA has named barriers

enum class Waits
{
    kNot,
    kForBlock,
    kForTeam,
    kForWarp,
    kForExchange,
    kDone
};

struct Fibre
{
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Waits waits = Waits::kNot;
    bool paused = false;
    int team = 0;
    int team_threads = 0;
    int exchanges = 0;
    std::size_t votes = 0;
};

struct Warp
{
    // A lane can be one exchange ahead of another that has not read yet.
    Words lanes[2][32];
};

std::atomic<unsigned> order_seed{0};
std::atomic<unsigned> blocks_at_once{1};
std::atomic<int> barrier_left_out{-1};
std::atomic<unsigned> yes_votes{0};

class Block
{
public:
    Block(std::function<void()> const& body, int threads, std::size_t shared_bytes);

    void begin(unsigned number);
    // Lets every fibre run until it waits, once; false if there was none that could do more than pause.
    bool round();
    bool done() const;
    // What went wrong in it; empty if nothing did.
    std::string complaint() const;

    void wait(Waits what);
    void wait_for_team(int number, int threads);
    bool vote(bool so, bool wait_for_all);
    void pause();
    Words const* exchange(Words const& words);
    bool may_access(std::uint32_t at, std::uint32_t size);
    SharedRaces& races();
    void complain(std::string const& words);

private:
    static void enter();
    bool release_if_all(std::size_t first, std::size_t last, Waits what);
    bool release_teams();
    bool turn(int thread);
    bool release();

    std::function<void()> const& body_;
    std::vector<Fibre> fibres_;
    std::vector<Warp> warps_;
    std::vector<int> order_;
    std::size_t shared_bytes_;
    std::vector<std::uint64_t> memory_; // and 16 bytes past the end that nothing may write
    std::unique_ptr<SharedRaces> races_;
    std::string complaint_;
    std::vector<bool> votes_; // how each ended
    ucontext_t scheduler_{};
    unsigned number_ = 0;
};

Block* block = nullptr; // of the fibre that runs

Block::Block(std::function<void()> const& body, int threads, std::size_t shared_bytes)
    : body_(body)
    , fibres_(static_cast<std::size_t>(threads))
    , warps_(static_cast<std::size_t>((threads + 31) / 32))
    , order_(static_cast<std::size_t>(threads))
    , shared_bytes_(shared_bytes)
    , memory_(shared_bytes / 8 + 4)
{
    for (Fibre& fibre : fibres_)
    {
        fibre.stack.reset(new char[kStackBytes]); // left as it is: most of it is never touched
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

void Block::begin(unsigned number)
{
    number_ = number;
    std::memset(memory_.data(), 0xff, memory_.size() * 8);
    races_.reset();
    votes_.clear();
    for (Fibre& fibre : fibres_)
    {
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStackBytes;
        fibre.context.uc_link = nullptr;
        fibre.waits = Waits::kNot;
        fibre.exchanges = 0;
        fibre.votes = 0;
        makecontext(&fibre.context, &Block::enter, 0);
    }
}

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

void Block::wait_for_team(int number, int threads)
{
    Fibre& fibre = fibres_[static_cast<std::size_t>(current.thread)];
    fibre.team = number;
    fibre.team_threads = threads;
    wait(Waits::kForTeam);
}

bool Block::vote(bool so, bool wait_for_all)
{
    std::size_t const number = fibres_[static_cast<std::size_t>(current.thread)].votes++;
    votes_.resize(std::max(votes_.size(), number + 1));
    votes_[number] = votes_[number] || so;
    if (wait_for_all)
    {
        wait(Waits::kForBlock);
    }
    yes_votes += votes_[number] ? 1u : 0u;
    return votes_[number];
}

void Block::pause()
{
    fibres_[static_cast<std::size_t>(current.thread)].paused = true;
    wait(Waits::kNot);
}

Words const* Block::exchange(Words const& words)
{
    auto const thread = static_cast<std::size_t>(current.thread);
    int const turn = fibres_[thread].exchanges++ & 1;
    warps_[thread / 32].lanes[turn][thread % 32] = words;
    wait(Waits::kForExchange);
    return warps_[thread / 32].lanes[turn];
}

bool Block::may_access(std::uint32_t at, std::uint32_t size)
{
    bool const fine = at + size <= shared_bytes_ && at % size == 0;
    if (!fine)
    {
        complain("an access of " + std::to_string(size) + " bytes of shared memory at " + std::to_string(at));
    }
    return fine;
}

SharedRaces& Block::races()
{
    if (races_ == nullptr)
    {
        races_ = std::make_unique<SharedRaces>(static_cast<int>(fibres_.size()), memory_.size() * 8);
    }
    return *races_;
}

void Block::complain(std::string const& words)
{
    complaint_ = complaint_.empty() ? words : complaint_;
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
    if (races_ != nullptr && what == Waits::kForWarp)
    {
        races_->meet(static_cast<int>(first / 32));
    }
    if (races_ != nullptr && what == Waits::kForBlock)
    {
        std::vector<int> warps(warps_.size());
        std::iota(warps.begin(), warps.end(), 0);
        races_->meet(warps);
    }
    return true;
}

// Lets the members of each team go on whose barrier all have met.
bool Block::release_teams()
{
    int waiting[kMostTeams] = {};
    for (Fibre const& fibre : fibres_)
    {
        waiting[fibre.team] += fibre.waits == Waits::kForTeam ? 1 : 0;
    }
    bool any = false;
    for (int team = 0; team < kMostTeams; ++team)
    {
        std::vector<int> warps;
        for (std::size_t i = 0; waiting[team] > 0 && i < fibres_.size(); ++i)
        {
            Fibre& fibre = fibres_[i];
            if (fibre.waits == Waits::kForTeam && fibre.team == team && fibre.team_threads == waiting[team])
            {
                fibre.waits = Waits::kNot;
                any = true;
                if (i % 32 == 0)
                {
                    warps.push_back(static_cast<int>(i / 32));
                }
            }
        }
        if (races_ != nullptr && !warps.empty())
        {
            races_->meet(warps);
        }
    }
    return any;
}

// Lets a fibre run until it waits, if it may; false if it did nothing but pause.
bool Block::turn(int thread)
{
    Fibre& fibre = fibres_[static_cast<std::size_t>(thread)];
    if (fibre.waits != Waits::kNot)
    {
        return false;
    }
    fibre.paused = false;
    current = {thread, static_cast<int>(fibres_.size()), number_, reinterpret_cast<char*>(memory_.data())};
    block = this;
    swapcontext(&scheduler_, &fibre.context);
    return !fibre.paused;
}

// Lets those go on that have nobody left to wait for; false if there are none.
bool Block::release()
{
    bool any = false;
    for (std::size_t first = 0; first < fibres_.size(); first += 32)
    {
        std::size_t const last = std::min(first + 32, fibres_.size());
        any = release_if_all(first, last, Waits::kForExchange) || any;
        any = release_if_all(first, last, Waits::kForWarp) || any;
    }
    any = release_teams() || any;
    return release_if_all(0, fibres_.size(), Waits::kForBlock) || any;
}

bool Block::round()
{
    bool any = false;
    for (int const thread : order_)
    {
        any = turn(thread) || any;
        // Odd seeds let a warp run as far ahead of the others as barriers allow, even ones keep all side by side.
        std::size_t const first = static_cast<std::size_t>(thread) / 32 * 32;
        while (order_seed % 2 == 1
            && (release_if_all(first, first + 32, Waits::kForExchange)
                || release_if_all(first, first + 32, Waits::kForWarp)))
        {
            for (std::size_t i = first; i < first + 32; ++i)
            {
                turn(static_cast<int>(i));
            }
        }
    }
    return release() || any;
}

bool Block::done() const
{
    return std::all_of(fibres_.begin(), fibres_.end(), [](Fibre const& f) { return f.waits == Waits::kDone; });
}

std::string Block::complaint() const
{
    char const* const memory = reinterpret_cast<char const*>(memory_.data());
    bool const untouched = std::all_of(
        memory + shared_bytes_, memory + memory_.size() * 8, [](char byte) { return byte == static_cast<char>(0xff); });
    if (!untouched)
    {
        return "it wrote past its " + std::to_string(shared_bytes_) + " bytes of shared memory";
    }
    return complaint_.empty() && races_ != nullptr ? races_->found() : complaint_;
}

// Runs blocks side by side until all are done; false if one failed.
bool run_together(std::vector<std::unique_ptr<Block>> const& blocks, unsigned first, unsigned count)
{
    std::vector<Block*> turns;
    for (unsigned i = 0; i < count; ++i)
    {
        blocks[i]->begin(first + i);
        turns.push_back(blocks[i].get());
    }
    if (order_seed % 2 == 1)
    {
        std::reverse(turns.begin(), turns.end());
    }
    auto const done = [](Block const* one) { return one->done(); };
    for (int idle = 0; !std::all_of(turns.begin(), turns.end(), done);)
    {
        bool any = false;
        for (Block* const one : turns)
        {
            any = (!one->done() && one->round()) || any;
        }
        idle = any ? 0 : idle + 1;
        if (idle > kMostIdleRounds)
        {
            std::fprintf(stderr, "emulation: the threads of block %u wait for each other for ever\n", current.block);
            return false;
        }
    }
    for (unsigned i = 0; i < count; ++i)
    {
        std::string const complaint = blocks[i]->complaint();
        if (!complaint.empty())
        {
            std::fprintf(stderr, "emulation: block %u: %s\n", first + i, complaint.c_str());
            return false;
        }
    }
    return true;
}

} // namespace

void wait_for_block()
{
    block->wait(Waits::kForBlock);
}

void wait_for_warp()
{
    block->wait(Waits::kForWarp);
}

void wait_for_team(int number, int threads)
{
    block->wait_for_team(number, threads);
}

bool vote(bool so, bool wait)
{
    return block->vote(so, wait);
}

void pause()
{
    block->pause();
}

Words const* exchange(Words const& words)
{
    return block->exchange(words);
}

char const* read_shared(std::uint32_t at, std::uint32_t size)
{
    if (!block->may_access(at, size))
    {
        return current.shared;
    }
    block->races().read(current.thread, at, size);
    return current.shared + at;
}

void write_shared(std::uint32_t at, std::uint32_t size, unsigned char const* values)
{
    if (block->may_access(at, size))
    {
        std::memcpy(current.shared + at, values, size);
        block->races().write(current.thread, at, size, values);
    }
}

void require(bool so, char const* words)
{
    if (!so)
    {
        block->complain(words);
    }
}

bool left_out(int barrier)
{
    return barrier == barrier_left_out;
}

bool run(std::function<void()> const& body, unsigned blocks, int threads, std::int64_t shared_bytes)
{
    unsigned const at_once = std::min(std::max(blocks_at_once.load(), 1u), blocks);
    std::vector<std::unique_ptr<Block>> all;
    for (unsigned i = 0; i < at_once; ++i)
    {
        all.push_back(std::make_unique<Block>(body, threads, static_cast<std::size_t>(shared_bytes)));
    }
    bool fine = true;
    for (unsigned first = 0; first < blocks && fine; first += at_once)
    {
        fine = run_together(all, first, std::min(at_once, blocks - first));
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

// Sets how many blocks run side by side.
extern "C" __attribute__((visibility("default"))) void quartermap_emulation_blocks(unsigned count)
{
    quartermap::emulation::blocks_at_once = count;
}

// How many threads were told by a vote of their block that it is so: those that then computed in float32 what was not
// finite.
extern "C" __attribute__((visibility("default"))) unsigned quartermap_emulation_yes_votes(void)
{
    return quartermap::emulation::yes_votes;
}

// Leaves out the barrier of this number (tensor_core/machine.h); none for -1.
extern "C" __attribute__((visibility("default"))) void quartermap_emulation_leave_out(int barrier)
{
    quartermap::emulation::barrier_left_out = barrier;
}
