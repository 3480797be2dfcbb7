// How many cycles of a scheduler an instruction takes that the kernels on tensor cores are made of: one line of JSON.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o rates rates.cu && ./rates
//
// One block of 16 warps, four on each scheduler, which is what the kernels have; each warp has eight independent
// chains, so that the rate is met and not the latency. "alone" is one kind of instruction; "beside" is the time of two
// kinds together, as they stand in the kernels: as long as the longer of both if they use different units, as long as
// their sum if not.
#include <cstdint>
#include <cstdio>

namespace
{

constexpr int kChains = 8;
constexpr int kRounds = 512;
constexpr int kThreads = 512;
constexpr int kWarpsOfScheduler = 4;

struct Exponential // MUFU.EX2
{
    static constexpr char const* kName = "MUFU.EX2";
    __device__ static void step(float (&v)[4], std::uint32_t (&)[4])
    {
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(v[0]));
    }
};

struct Pack // F2FP
{
    static constexpr char const* kName = "F2FP";
    __device__ static void step(float (&v)[4], std::uint32_t (&w)[4])
    {
        asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[0]) : "f"(v[0]), "f"(v[1]));
    }
};

struct PackedProduct // HFMA2
{
    static constexpr char const* kName = "HFMA2";
    __device__ static void step(float (&)[4], std::uint32_t (&w)[4])
    {
        asm volatile("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(w[1]) : "r"(w[2]), "r"(w[3]));
    }
};

struct Product // FFMA
{
    static constexpr char const* kName = "FFMA";
    __device__ static void step(float (&v)[4], std::uint32_t (&)[4])
    {
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v[1]) : "f"(v[2]), "f"(v[3]));
    }
};

struct Matrix8 // HMMA.1688.F32
{
    static constexpr char const* kName = "HMMA.1688.F32";
    __device__ static void step(float (&v)[4], std::uint32_t (&w)[4])
    {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
                     : "r"(w[0]), "r"(w[1]), "r"(w[2]));
    }
};

struct Matrix16 // HMMA.16816.F32
{
    static constexpr char const* kName = "HMMA.16816.F32";
    __device__ static void step(float (&v)[4], std::uint32_t (&w)[4])
    {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%4,%6}, {%0,%1,%2,%3};"
                     : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
                     : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]));
    }
};

struct Matrix8Half // HMMA.1688.F16
{
    static constexpr char const* kName = "HMMA.1688.F16";
    __device__ static void step(float (&)[4], std::uint32_t (&w)[4])
    {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%2}, {%0,%1};"
                     : "+r"(w[0]), "+r"(w[1])
                     : "r"(w[2]), "r"(w[3]));
    }
};

struct Nothing
{
    __device__ static void step(float (&)[4], std::uint32_t (&)[4]) {}
};

template <class First, class Second>
__global__ void rounds(long long* cycles, float* kept)
{
    float v[kChains][4];
    std::uint32_t w[kChains][4];
    for (int c = 0; c < kChains; ++c)
    {
        for (int i = 0; i < 4; ++i)
        {
            v[c][i] = 1e-3F * static_cast<float>(threadIdx.x + static_cast<unsigned>(c + i));
            w[c][i] = threadIdx.x + static_cast<unsigned>(c * i);
        }
    }
    __syncthreads();
    long long const begin = clock64();
#pragma unroll 1
    for (int n = 0; n < kRounds; ++n)
    {
#pragma unroll
        for (int c = 0; c < kChains; ++c)
        {
            First::step(v[c], w[c]);
            Second::step(v[c], w[c]);
        }
    }
    __syncthreads();
    long long const end = clock64();
    float sum = 0.0F;
    for (int c = 0; c < kChains; ++c)
    {
        for (int i = 0; i < 4; ++i)
        {
            sum += v[c][i] + static_cast<float>(w[c][i]);
        }
    }
    kept[threadIdx.x] = sum; // so that nothing is left out
    if (threadIdx.x == 0)
    {
        *cycles = end - begin;
    }
}

// Cycles of a scheduler for each instruction, or pair of them; negative after an error.
template <class First, class Second>
double measure(long long* cycles, float* kept)
{
    double best = 1e30;
    for (int n = 0; n < 5; ++n)
    {
        rounds<First, Second><<<1, kThreads>>>(cycles, kept);
        long long found = 0;
        if (cudaMemcpy(&found, cycles, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess)
        {
            return -1.0;
        }
        double const each = static_cast<double>(found) / (kRounds * kChains * kWarpsOfScheduler);
        best = each < best ? each : best;
    }
    return best;
}

template <class First>
void print_alone(long long* cycles, float* kept, char const* before)
{
    std::printf("%s\"%s\": %.3f", before, First::kName, measure<First, Nothing>(cycles, kept));
}

template <class First, class Second>
void print_beside(long long* cycles, float* kept, char const* before)
{
    std::printf("%s\"%s + %s\": %.3f", before, First::kName, Second::kName, measure<First, Second>(cycles, kept));
}

} // namespace

int main()
{
    long long* cycles = nullptr;
    float* kept = nullptr;
    if (cudaMalloc(&cycles, sizeof *cycles) != cudaSuccess || cudaMalloc(&kept, kThreads * sizeof *kept) != cudaSuccess)
    {
        std::fprintf(stderr, "error: no memory on a GPU: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 2;
    }
    std::printf("{\"alone\": {");
    print_alone<Exponential>(cycles, kept, "");
    print_alone<Pack>(cycles, kept, ", ");
    print_alone<PackedProduct>(cycles, kept, ", ");
    print_alone<Product>(cycles, kept, ", ");
    print_alone<Matrix8>(cycles, kept, ", ");
    print_alone<Matrix16>(cycles, kept, ", ");
    print_alone<Matrix8Half>(cycles, kept, ", ");
    std::printf("}, \"beside\": {");
    print_beside<Exponential, Pack>(cycles, kept, "");
    print_beside<Exponential, PackedProduct>(cycles, kept, ", ");
    print_beside<Exponential, Matrix8>(cycles, kept, ", ");
    print_beside<PackedProduct, Matrix8>(cycles, kept, ", ");
    print_beside<Product, Matrix8>(cycles, kept, ", ");
    std::printf("}}\n");
    return 0;
}
