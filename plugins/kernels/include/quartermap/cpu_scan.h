/* The selective scan on a CPU: the C interface of its kernels.
 *
 * A map of (H, W) positions is scanned in K directions that are added up, or a sequence in one: with h_0 = 0, and along
 * the order of direction k,
 *
 *     dt = softplus(dt_weight_k * dt_k + dt_bias_k)      (or dt_k + dt_bias_k, without projection and without softplus)
 *     h  = exp(dt * A_k) * h + dt * B_k * x
 *     y  = C_k * h + D_k * x
 *
 * Shapes, all contiguous and in raster order (row-major H, W). G groups of d channels have B and C of their own: a map
 * is one group (G = 1), a sequence of L positions is a map of 1 row with one direction, the row.
 *
 *     x, y        (batch, G * d, H, W)                                         T
 *     dt          (batch, G * K * R, H, W), or (batch, G * K * d, H, W)        T        R = 0: the second, no dt_weight
 *     B, C        (batch, G * K * N, H, W)                                     T
 *     A           (G * K * d, N), negative                                     float32
 *     D, dt_bias  (G * K * d), or NULL for none                                float32
 *     dt_weight   (G * K * d, R)                                               T
 *
 * T is float32, float64, float16 or bfloat16; everything is computed in float32. Neither torch nor ONNX Runtime is
 * needed. Every function may be called from any thread; none throws or ends the process.
 */
#ifndef QUARTERMAP_CPU_SCAN_H
#define QUARTERMAP_CPU_SCAN_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define QUARTERMAP_CPU_API __declspec(dllexport)
#else
#define QUARTERMAP_CPU_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C"
{
#endif

/* Changes whenever a structure or the meaning of a function changes. */
#define QUARTERMAP_CPU_SCAN_VERSION 1

enum QuartermapCpuElementType
{
    QUARTERMAP_CPU_FLOAT32 = 0,
    QUARTERMAP_CPU_FLOAT16 = 1,
    QUARTERMAP_CPU_BFLOAT16 = 2,
    QUARTERMAP_CPU_FLOAT64 = 3
};

enum QuartermapCpuDirection
{
    QUARTERMAP_CPU_ROW = 0,
    QUARTERMAP_CPU_COLUMN = 1,
    QUARTERMAP_CPU_ROW_REVERSE = 2,
    QUARTERMAP_CPU_COLUMN_REVERSE = 3
};

enum QuartermapCpuStatus
{
    QUARTERMAP_CPU_SUCCESS = 0,
    QUARTERMAP_CPU_BAD_SIZE = 1,
    QUARTERMAP_CPU_BAD_DIRECTION = 2,
    QUARTERMAP_CPU_BAD_ELEMENT_TYPE = 3,
    QUARTERMAP_CPU_TOO_LARGE = 4,
    QUARTERMAP_CPU_NULL_POINTER = 5,
    QUARTERMAP_CPU_OUT_OF_MEMORY = 6,
    QUARTERMAP_CPU_NO_SUCH_INSTRUCTION_SET = 7,
    QUARTERMAP_CPU_NOT_RUN = 8
};

/* What is computed: sizes, directions and types. */
typedef struct QuartermapCpuScan
{
    int64_t batch;
    int64_t groups;          /* G */
    int64_t channels;        /* d, of one group */
    int64_t height;
    int64_t width;
    int64_t d_state;         /* N */
    int64_t dt_rank;         /* R; 0: dt is the full time-step map */
    int32_t const* directions;
    int32_t direction_count; /* K */
    int32_t softplus;        /* whether softplus is applied to the time step */
    int32_t element_type;    /* of x, dt, B, C, dt_weight and y */
    int32_t threads;         /* how many tasks may run at once; 0: as many as the process has cores */
} QuartermapCpuScan;

/* Where the tensors lie. */
typedef struct QuartermapCpuTensors
{
    void const* x;
    void const* dt;
    void const* B;
    void const* C;
    float const* A;
    float const* D;          /* NULL: none */
    float const* dt_bias;    /* NULL: none */
    void const* dt_weight;   /* NULL when dt_rank is 0 */
    void* y;
} QuartermapCpuTensors;

/* One task of many: it has all of its work in `argument`, and is told which part of it to do. */
typedef void (*QuartermapCpuTask)(void* argument, size_t index);

/* Runs task(argument, i) once for every i < count, in any order and on any threads, and returns when all are done: 0, or
 * anything else if it could not. `pool` is what the caller of the scan gave. */
typedef int32_t (*QuartermapCpuParallel)(void* pool, QuartermapCpuTask task, void* argument, size_t count);

/* A team of threads of an OpenMP runtime: `start` is its GOMP_parallel, which GCC's runtime has, and LLVM's too. Where the
 * caller computes with such a team, its threads wait for work without sleeping, and others would take turns with them. */
typedef struct QuartermapCpuTeam
{
    void (*start)(void (*member)(void*), void* argument, unsigned int threads, unsigned int flags);
    uint32_t threads;
} QuartermapCpuTeam;

/* A QuartermapCpuParallel whose pool is a QuartermapCpuTeam. */
QUARTERMAP_CPU_API int32_t quartermap_cpu_by_team(
    void* team, QuartermapCpuTask task, void* argument, size_t count);

/* QUARTERMAP_CPU_SCAN_VERSION of the library. */
QUARTERMAP_CPU_API uint32_t quartermap_cpu_version(void);

/* Words for a status; never NULL, and good until the process ends. */
QUARTERMAP_CPU_API char const* quartermap_cpu_message(int32_t status);

/* What the library says of itself, as JSON; never NULL, and good until the process ends. */
QUARTERMAP_CPU_API char const* quartermap_cpu_contract(void);

/* The instruction set that scans use: the widest that this processor has, or the one that was chosen. */
QUARTERMAP_CPU_API char const* quartermap_cpu_instruction_set(void);

/* Chooses the instruction set of scans that start from now on, by name; NULL for the widest. For tests, and for
 * machines whose wide vectors slow everything else down. The environment variable QUARTERMAP_INSTRUCTION_SET does the
 * same before the first scan; a name there that cannot be had is refused by every scan. */
QUARTERMAP_CPU_API int32_t quartermap_cpu_choose(char const* name);

/* Scans. `parallel` runs its tasks with `pool`; NULL: on threads of its own that end with the call. */
QUARTERMAP_CPU_API int32_t quartermap_cpu_scan(QuartermapCpuScan const* scan, QuartermapCpuTensors const* tensors,
    QuartermapCpuParallel parallel, void* pool);

#ifdef __cplusplus
}
#endif

#endif
