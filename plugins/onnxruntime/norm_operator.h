// The operator LayerNormalization2D of the domain `quartermap`, for ONNX Runtime's CPU provider: layer normalisation over the
// channels of maps (batch, channels, height, width), as LayerNormalization between two transpositions computes it. No file
// holds it; sessions put it in the place of the three nodes (quartermap_deploy/targets/fused_norms.py).
#pragma once

#include <cstdint>

#include "interface.h"

namespace quartermap::onnxruntime
{

// ONNX Runtime keeps its address: it lives as long as the library.
struct NormOperator : Operator
{
    Api const* api;
    std::int32_t threads; // of the sessions that it is registered for; 0 if nobody said
};

NormOperator norm_operator(Api const& api, std::int32_t threads);

} // namespace quartermap::onnxruntime
