// A session's stream, and memory whose life is in the stream's order. On a device both are CUDA's (stream.cpp); where the
// kernels run on the CPU, for tests, there is no stream, and memory is the host's (emulated_stream.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "interface.h"

namespace quartermap::onnxruntime
{

// The provider that has the stream, as ONNX Runtime spells it; null is the CPU.
char const* stream_provider();

// The stream on which a node has to put its work.
void* stream_of(Api const& api, KernelContext* context);

// Memory that is there for what is put on the stream from now on, until `release`; each returns a QuartermapStatus.
std::int32_t reserve(void** memory, std::size_t bytes, void* stream);
std::int32_t release(void* memory, void* stream);

} // namespace quartermap::onnxruntime
