// Messages of the plugin: to TensorRT's logger where there is one that we can call, else to standard error.
#pragma once

#include <NvInferRuntime.h>

namespace quartermap
{

// As printf.
__attribute__((format(printf, 1, 2))) void log_error(char const* format, ...) noexcept;

// The major version of the TensorRT library that holds an address; 0 if it is none.
int tensorrt_major_of(void const* address) noexcept;

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

} // namespace quartermap
