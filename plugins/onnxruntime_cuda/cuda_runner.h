// Scans by the CUDA kernels, on the stream of the session that runs them.
#pragma once

#include "scan_runner.h"

namespace quartermap::onnxruntime
{

ScanProvider cuda_provider();

} // namespace quartermap::onnxruntime
