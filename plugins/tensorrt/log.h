// Messages of the plugin: to TensorRT's logger where there is one that we can call, else to standard error.
#pragma once

#include "registry.h"

namespace quartermap
{

// As printf.
__attribute__((format(printf, 1, 2))) void log_error(char const* format, ...) noexcept;

// The order of functions in the TensorRT library that holds an address.
Order order_at(void const* address) noexcept;

void set_logger_finder(void* finder) noexcept;

} // namespace quartermap
