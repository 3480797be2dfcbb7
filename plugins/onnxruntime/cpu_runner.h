// Scans by the CPU kernels, on the threads of the session that runs them.
#pragma once

#include "scan_runner.h"

namespace quartermap::onnxruntime
{

ScanProvider cpu_provider();

} // namespace quartermap::onnxruntime
