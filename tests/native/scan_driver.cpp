// Scans of many kinds against a scan in float64 that is written out here, for builds that Python cannot load: with
// sanitizers, for other processors, and without a C library to load things. Prints the largest error of each
// instruction set as JSON; ends with 1 if one is too large or something is refused.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "quartermap/cpu_scan.h"

namespace
{

constexpr double TOLERANCE = 1e-6;
// Half a step of bfloat16, as a share of the value.
constexpr double BFLOAT16_ROUNDING = 1.0 / 256;

struct Case
{
    std::int64_t batch, groups, channels, height, width, states, rank;
    std::vector<std::int32_t> directions;
    bool softplus, skip, bias;
    std::int32_t threads;
    double largest_step; // time steps are spread over three orders of magnitude below it
};

// Numbers in [0, 1), the same everywhere.
class Random
{
public:
    double operator()()
    {
        mState = mState * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<double>(mState >> 11) / 9007199254740992.0;
    }

private:
    std::uint64_t mState{1};
};

std::vector<float> numbers(Random& random, std::int64_t count, double low, double high)
{
    std::vector<float> result(static_cast<std::size_t>(count));
    for (float& value : result)
    {
        value = static_cast<float>(low + (high - low) * random());
    }
    return result;
}

// Everything in one element type that is exact in float32.
struct Tensors
{
    std::vector<float> x, dt, B, C, A, D, bias, weight;

    Tensors(Case const& c, Random& random)
    {
        std::int64_t const positions = c.height * c.width;
        std::int64_t const count = static_cast<std::int64_t>(c.directions.size());
        std::int64_t const wide = c.groups * count * c.channels;
        x = numbers(random, c.batch * c.groups * c.channels * positions, -1, 1);
        B = numbers(random, c.batch * c.groups * count * c.states * positions, -1, 1);
        C = numbers(random, c.batch * c.groups * count * c.states * positions, -1, 1);
        A = numbers(random, wide * c.states, -1, -0.25);
        D = numbers(random, wide, -1, 1);
        bias = numbers(random, wide, 0, 1);
        for (float& value : bias)
        {
            double const step = c.largest_step * std::pow(10.0, -3.0 * value);
            value = static_cast<float>(c.softplus ? std::log(std::expm1(step)) : step);
        }
        double const low = c.softplus ? -0.3 : 0.0;
        std::int64_t const rows = c.batch * c.groups * count * (c.rank == 0 ? c.channels : c.rank);
        dt = numbers(random, rows * positions, low, 0.3);
        weight = numbers(random, wide * c.rank, 0, 0.1);
    }

    void round_to_bfloat16()
    {
        for (std::vector<float>* values : {&x, &dt, &B, &C, &weight})
        {
            for (float& value : *values)
            {
                std::uint32_t bits;
                std::memcpy(&bits, &value, 4);
                bits &= 0xffff0000U;
                std::memcpy(&value, &bits, 4);
            }
        }
    }
};

std::vector<std::uint16_t> upper_halves(std::vector<float> const& values)
{
    std::vector<std::uint16_t> result;
    for (float const value : values)
    {
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        result.push_back(static_cast<std::uint16_t>(bits >> 16));
    }
    return result;
}

std::vector<std::size_t> order_of(std::int32_t direction, std::int64_t height, std::int64_t width)
{
    std::vector<std::size_t> order;
    bool const columns = direction % 2 == 1;
    for (std::int64_t i = 0; i < height * width; ++i)
    {
        std::int64_t const position = columns ? i % height * width + i / height : i;
        order.push_back(static_cast<std::size_t>(position));
    }
    if (direction >= QUARTERMAP_CPU_ROW_REVERSE)
    {
        std::reverse(order.begin(), order.end());
    }
    return order;
}

// The definition: one position after the other.
std::vector<double> definition(Case const& c, Tensors const& t)
{
    std::size_t const L = static_cast<std::size_t>(c.height * c.width);
    std::size_t const K = c.directions.size();
    std::size_t const G = static_cast<std::size_t>(c.groups);
    std::size_t const d = static_cast<std::size_t>(c.channels);
    std::size_t const N = static_cast<std::size_t>(c.states);
    std::size_t const R = static_cast<std::size_t>(c.rank);
    std::vector<double> y(static_cast<std::size_t>(c.batch) * G * d * L, 0.0);
    for (std::size_t image = 0; image < static_cast<std::size_t>(c.batch); ++image)
    {
        for (std::size_t row = 0; row < G * K * d; ++row)
        {
            std::size_t const group = row / (K * d);
            std::size_t const k = row / d % K;
            std::size_t const map = (image * G + group) * K + k;
            std::size_t const channel = (image * G + group) * d + row % d;
            std::vector<double> state(N, 0.0);
            for (std::size_t const l : order_of(c.directions[k], c.height, c.width))
            {
                double step = c.bias ? t.bias[row] : 0.0;
                step += R == 0 ? t.dt[(map * d + row % d) * L + l] : 0.0;
                for (std::size_t r = 0; r < R; ++r)
                {
                    step += static_cast<double>(t.weight[row * R + r]) * t.dt[(map * R + r) * L + l];
                }
                if (c.softplus)
                {
                    step = std::fmax(step, 0.0) + std::log1p(std::exp(-std::fabs(step)));
                }
                double const x = t.x[channel * L + l];
                double sum = c.skip ? t.D[row] * x : 0.0;
                for (std::size_t n = 0; n < N; ++n)
                {
                    state[n] = std::exp(step * t.A[row * N + n]) * state[n] + step * t.B[(map * N + n) * L + l] * x;
                    sum += t.C[(map * N + n) * L + l] * state[n];
                }
                y[channel * L + l] += sum;
            }
        }
    }
    return y;
}

// A pool of the caller's: threads that take tasks in turns.
std::int32_t run_on_three(void*, QuartermapCpuTask task, void* argument, std::size_t count)
{
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i)
    {
        threads.emplace_back(
            [&]
            {
                for (std::size_t j = next++; j < count; j = next++)
                {
                    task(argument, j);
                }
            });
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    return 0;
}

QuartermapCpuScan scan_of(Case const& c, std::int32_t element_type)
{
    return {c.batch, c.groups, c.channels, c.height, c.width, c.states, c.rank, c.directions.data(),
        static_cast<std::int32_t>(c.directions.size()), c.softplus, element_type, c.threads};
}

// The largest difference as a share of the largest output; infinite where something is refused or not a number.
double difference(std::vector<double> const& wanted, std::vector<float> const& y)
{
    double largest = 0;
    double worst = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i)
    {
        largest = std::fmax(largest, std::fabs(wanted[i]));
        double const error = std::fabs(wanted[i] - static_cast<double>(y[i]));
        worst = error <= worst ? worst : error; // keeps what is not a number
    }
    return worst / largest;
}

double error_of(Case const& c, std::vector<double> const& wanted, Tensors const& t, QuartermapCpuParallel pool)
{
    std::vector<float> y(wanted.size(), NAN);
    QuartermapCpuScan const scan = scan_of(c, QUARTERMAP_CPU_FLOAT32);
    QuartermapCpuTensors const tensors{t.x.data(), t.dt.data(), t.B.data(), t.C.data(), t.A.data(),
        c.skip ? t.D.data() : nullptr, c.bias ? t.bias.data() : nullptr, c.rank > 0 ? t.weight.data() : nullptr,
        y.data()};
    return quartermap_cpu_scan(&scan, &tensors, pool, nullptr) == 0 ? difference(wanted, y) : INFINITY;
}

double error_in_bfloat16(Case const& c, std::vector<double> const& wanted, Tensors const& t)
{
    std::vector<std::uint16_t> const x = upper_halves(t.x), dt = upper_halves(t.dt), B = upper_halves(t.B),
                                     C = upper_halves(t.C), weight = upper_halves(t.weight);
    std::vector<std::uint16_t> halves(wanted.size(), 0x7fff);
    QuartermapCpuScan const scan = scan_of(c, QUARTERMAP_CPU_BFLOAT16);
    QuartermapCpuTensors const tensors{x.data(), dt.data(), B.data(), C.data(), t.A.data(),
        c.skip ? t.D.data() : nullptr, c.bias ? t.bias.data() : nullptr, c.rank > 0 ? weight.data() : nullptr,
        halves.data()};
    if (quartermap_cpu_scan(&scan, &tensors, nullptr, nullptr) != 0)
    {
        return INFINITY;
    }
    std::vector<float> y;
    for (std::uint16_t const half : halves)
    {
        std::uint32_t const bits = static_cast<std::uint32_t>(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        y.push_back(value);
    }
    // What rounding the output costs is taken off.
    return std::fmax(difference(wanted, y) - BFLOAT16_ROUNDING, 0.0);
}

std::vector<Case> cases()
{
    std::vector<std::int32_t> const vmamba{0, 1, 2, 3};
    return {
        {1, 1, 5, 7, 9, 1, 3, vmamba, true, true, true, 1, 1.0},
        {2, 1, 19, 5, 4, 5, 0, {1, 3}, true, false, false, 3, 20.0},
        {1, 1, 4, 1, 1, 16, 1, {0}, true, true, true, 2, 1.0},
        {1, 1, 3, 1, 31, 2, 2, {2, 2, 0}, false, true, true, 1, 0.1},
        {1, 1, 33, 13, 1, 4, 48, {3}, true, false, true, 1, 20.0},
        {1, 3, 6, 1, 70, 17, 0, {0}, false, true, true, 2, 1.0},
        // Directions apart, and then segments.
        {1, 1, 40, 20, 9, 4, 3, vmamba, true, true, true, 3, 0.01},
        {1, 1, 5, 40, 27, 3, 2, {0, 3}, true, true, true, 4, 0.001},
        {1, 2, 9, 1, 1100, 4, 0, {0}, true, false, true, 8, 1.0},
    };
}

// What has to be refused, with memory that a sanitizer watches.
bool refuses()
{
    std::int32_t const known = 0;
    std::int32_t const unknown = 9;
    QuartermapCpuScan const good{1, 1, 1, 1, 1, 1, 0, &known, 1, 1, 0, 1};
    QuartermapCpuTensors const none{};
    QuartermapCpuScan negative = good;
    negative.height = -1;
    QuartermapCpuScan large = good;
    large.height = INT64_MAX;
    large.width = INT64_MAX;
    QuartermapCpuScan lost = good;
    lost.directions = &unknown;
    return quartermap_cpu_scan(nullptr, &none, nullptr, nullptr) == QUARTERMAP_CPU_NULL_POINTER
        && quartermap_cpu_scan(&good, &none, nullptr, nullptr) == QUARTERMAP_CPU_NULL_POINTER
        && quartermap_cpu_scan(&negative, &none, nullptr, nullptr) == QUARTERMAP_CPU_BAD_SIZE
        && quartermap_cpu_scan(&large, &none, nullptr, nullptr) == QUARTERMAP_CPU_TOO_LARGE
        && quartermap_cpu_scan(&lost, &none, nullptr, nullptr) == QUARTERMAP_CPU_BAD_DIRECTION;
}

// The largest error over all cases, as they are, with a pool of the caller's, and in bfloat16.
double worst_of_all()
{
    double worst = 0;
    Random random;
    for (Case const& c : cases())
    {
        Tensors tensors(c, random);
        tensors.round_to_bfloat16();
        std::vector<double> const wanted = definition(c, tensors);
        for (double const error : {error_of(c, wanted, tensors, nullptr), error_of(c, wanted, tensors, run_on_three),
                 error_in_bfloat16(c, wanted, tensors)})
        {
            worst = error <= worst ? worst : error;
        }
    }
    return worst;
}

// Several callers at once, who share the library's scratch memory.
bool callers_agree()
{
    std::atomic<int> right{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
    {
        callers.emplace_back([&] { right += worst_of_all() <= TOLERANCE ? 1 : 0; });
    }
    for (std::thread& caller : callers)
    {
        caller.join();
    }
    return right == 4;
}

} // namespace

int main()
{
    bool good = refuses();
    std::string report;
    for (char const* const name : {"avx512", "avx2", "baseline", "neon"})
    {
        if (quartermap_cpu_choose(name) == QUARTERMAP_CPU_SUCCESS)
        {
            double const worst = worst_of_all();
            good = good && worst <= TOLERANCE;
            char entry[64];
            std::snprintf(entry, sizeof(entry), "%s\"%s\": %.3e", report.empty() ? "" : ", ", name, worst);
            report += entry;
        }
    }
    good = good && !report.empty() && callers_agree();
    std::printf("{\"errors\": {%s}, \"good\": %s}\n", report.c_str(), good ? "true" : "false");
    return good ? 0 : 1;
}
