/* The selective scan of a feature map in several directions: the C interface of the kernels.
 *
 *     y = sum over k of scan_k(x, dt_k, B_k, C_k; A_k, D_k, dt_bias_k)
 *
 * With h_0 = 0, and along the order of direction k:
 *
 *     dt = softplus(dt_weight_k * dt_k + dt_bias_k)      (or dt_k + dt_bias_k, without projection and without softplus)
 *     h  = exp(dt * A_k) * h + dt * B_k * x
 *     y  = C_k * h + D_k * x
 *
 * Shapes, all contiguous and in raster order (row-major H, W):
 *
 *     x, y        (batch, d_inner, H, W)                                   T
 *     dt          (batch, K * R, H, W), or (batch, K * d_inner, H, W)      T        R = 0: the second, and no dt_weight
 *     B, C        (batch, K * N, H, W)                                     T
 *     A           (K * d_inner, N), negative                               float32
 *     D, dt_bias  (K * d_inner)                                            float32
 *     dt_weight   (K * d_inner, R)                                         T
 *
 * T is float32, float16 or bfloat16. States and decays are float32 always; where tensor cores compute a scan, steps, drives
 * and sums are rounded to 16 bits, and computed again in float32 where one leaves their range (docs/adr/0019), elsewhere
 * nothing but y. Neither torch nor TensorRT is needed.
 *
 * A scan is planned once for each shape, its plan prepared once on each device, and then launched any number of times.
 * Every function may be called from any thread. None ends the process, and a launch neither allocates memory nor waits
 * for the device, so that it may be captured in a CUDA graph.
 */
#ifndef QUARTERMAP_SELECTIVE_SCAN_H
#define QUARTERMAP_SELECTIVE_SCAN_H

#include <stdint.h>

#if defined(_WIN32)
#define QUARTERMAP_API __declspec(dllexport)
#else
#define QUARTERMAP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C"
{
#endif

/* Changes whenever a structure or the meaning of a function changes, and when the kernels do, so that what was measured
 * of them no longer holds. */
#define QUARTERMAP_SELECTIVE_SCAN_VERSION 4

#define QUARTERMAP_MAX_DIRECTIONS 8

enum QuartermapElementType
{
    QUARTERMAP_FLOAT32 = 0,
    QUARTERMAP_FLOAT16 = 1,
    QUARTERMAP_BFLOAT16 = 2
};

enum QuartermapDirection
{
    QUARTERMAP_ROW = 0,
    QUARTERMAP_COLUMN = 1,
    QUARTERMAP_ROW_REVERSE = 2,
    QUARTERMAP_COLUMN_REVERSE = 3
};

enum QuartermapStatus
{
    QUARTERMAP_SUCCESS = 0,
    QUARTERMAP_BAD_SIZE = 1,
    QUARTERMAP_BAD_DIRECTION = 2,
    QUARTERMAP_BAD_ELEMENT_TYPE = 3,
    QUARTERMAP_TOO_LARGE = 4,
    QUARTERMAP_NULL_POINTER = 5,
    QUARTERMAP_WORKSPACE_TOO_SMALL = 6,
    QUARTERMAP_SHARED_MEMORY_TOO_SMALL = 7,
    QUARTERMAP_NO_KERNEL_IMAGE = 8,
    QUARTERMAP_MISALIGNED = 9,
    QUARTERMAP_BAD_KIND = 10,
    /* A code of the CUDA runtime is added to this one. */
    QUARTERMAP_CUDA_ERROR = 1000
};

/* Which kernels carry a plan out. */
enum QuartermapKernels
{
    QUARTERMAP_GENERAL = 0,  /* any scan */
    QUARTERMAP_RESIDENT = 1, /* on tensor cores, x and y in shared memory: large batches of some maps */
    QUARTERMAP_SPLIT = 2,    /* on tensor cores, one direction or a part of it in a block: small batches, large maps */
    QUARTERMAP_STREAMED = 3  /* on tensor cores, x and y in global memory: large batches of other maps */
};

/* What is computed: sizes, directions and types. Plain data; set it to zero before filling it. */
typedef struct QuartermapScan
{
    int64_t batch;
    int64_t d_inner;
    int64_t height;
    int64_t width;
    int64_t d_state;        /* N */
    int64_t dt_rank;        /* R; 0: dt is the full time-step map */
    int32_t direction_count; /* K, at most QUARTERMAP_MAX_DIRECTIONS */
    int32_t directions[QUARTERMAP_MAX_DIRECTIONS];
    int32_t softplus;       /* whether softplus is applied to the time step */
    int32_t element_type;   /* of x, dt, B, C, dt_weight and y */
} QuartermapScan;

/* Where the tensors lie, all on the current device, each and the workspace from a multiple of 16 bytes on. */
typedef struct QuartermapScanTensors
{
    void const* x;
    void const* dt;
    void const* B;
    void const* C;
    float const* A;
    float const* D;
    float const* dt_bias;
    void const* dt_weight; /* NULL when dt_rank is 0 */
    void* y;
    void* workspace; /* may be NULL when no workspace is needed */
    uint64_t workspace_bytes;
} QuartermapScanTensors;

/* A scan and how it is divided on one kind of device: made once for each shape, used for any number of launches. Plain
 * data that may be copied. The first fields are there to be read. */
typedef struct QuartermapScanPlan
{
    QuartermapScan scan;
    int64_t blocks;
    int32_t threads;         /* per block */
    int32_t channels;        /* per block */
    int32_t chunk;           /* positions that a block scans at a time */
    int32_t shared_bytes;    /* of dynamic shared memory per block */
    int32_t resident;        /* 1: x and y of the block's channels lie in shared memory */
    int32_t kernels;         /* QuartermapKernels */
    int32_t layout[32];      /* of launch_plan.h */
    uint64_t workspace_bytes;
} QuartermapScanPlan;

/* QUARTERMAP_SELECTIVE_SCAN_VERSION of the library. */
QUARTERMAP_API uint32_t quartermap_selective_scan_version(void);

/* Words for a status; never NULL, and good until the process ends. */
QUARTERMAP_API char const* quartermap_selective_scan_message(int32_t status);

/* Checks sizes, directions and types without a device. */
QUARTERMAP_API int32_t quartermap_selective_scan_validate(QuartermapScan const* scan);

/* Bytes of workspace that a launch may need on any device; 0 for an invalid scan. Grows with batch, height and width. */
QUARTERMAP_API uint64_t quartermap_selective_scan_workspace(QuartermapScan const* scan);

/* Divides a scan for the current device: by the kernels that estimates find the quickest, or by those that the
 * environment variable QUARTERMAP_KERNELS names (general, resident, split, streamed) where they suit the scan. */
QUARTERMAP_API int32_t quartermap_selective_scan_plan(QuartermapScan const* scan, QuartermapScanPlan* plan);

/* Divides a scan for a device with this many multiprocessors and this much shared memory, in bytes: for one block, as
 * opted in, and for one multiprocessor. Needs no device. */
QUARTERMAP_API int32_t quartermap_selective_scan_plan_for(QuartermapScan const* scan, int32_t multiprocessors,
    int64_t shared_per_block, int64_t shared_per_multiprocessor, QuartermapScanPlan* plan);

/* Makes the current device ready for the launches of a plan: loads its kernels' code, which CUDA would otherwise do at the
 * first launch, and lets them use all shared memory that a block can have. May allocate memory and wait for the
 * device, so call it outside the capture of a CUDA graph. Calling it again, or from several threads, does no harm. */
QUARTERMAP_API int32_t quartermap_selective_scan_prepare(QuartermapScanPlan const* plan);

/* Puts the plan's kernels, one to three, on the stream (a cudaStream_t) of the current device, on which the plan has been
 * prepared. */
QUARTERMAP_API int32_t quartermap_selective_scan_launch(
    QuartermapScanPlan const* plan, QuartermapScanTensors const* tensors, void* stream);

#ifdef __cplusplus
}
#endif

#endif
