/* Layer normalisation of maps over their channels, on a CPU: the C interface of its kernel.
 *
 * At each position of each map, with mean and variance over the channels,
 *
 *     y = (x - mean) / sqrt(variance + epsilon) * scale + bias
 *
 * which is ONNX's LayerNormalization over the last axis between a transposition to channel-last and the one back. Maps are
 * channel-first and contiguous, in float32. No function throws or ends the process.
 */
#ifndef QUARTERMAP_CPU_NORM_H
#define QUARTERMAP_CPU_NORM_H

#include "quartermap/cpu_scan.h"

#ifdef __cplusplus
extern "C"
{
#endif

typedef struct QuartermapCpuNorm
{
    int64_t batch;
    int64_t channels;
    int64_t positions;  /* H * W */
    float epsilon;      /* above 0 */
    int32_t threads;    /* how many tasks may run at once; 0: as many as the process has cores */
    float const* x;     /* (batch, channels, H, W) */
    float const* scale; /* (channels) */
    float const* bias;  /* (channels) */
    float* y;           /* as x, and another place */
} QuartermapCpuNorm;

/* Normalises; returns a QuartermapCpuStatus. `parallel` runs its tasks with `pool`; NULL: on threads of its own. */
QUARTERMAP_CPU_API int32_t quartermap_cpu_norm(
    QuartermapCpuNorm const* norm, QuartermapCpuParallel parallel, void* pool);

#ifdef __cplusplus
}
#endif

#endif
