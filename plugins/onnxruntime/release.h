// What releases of ONNX Runtime can do, and what is said to one that can do too little.
#pragma once

#include <cstdlib>
#include <string>

#include "interface.h"

namespace quartermap::onnxruntime
{

// Whether operators may infer shapes in this release, such as "1.23.2"; see `scan_operator`.
inline bool can_infer(char const* release)
{
    char* rest = nullptr;
    long const major = std::strtol(release, &rest, 10);
    return major > 1 || (*rest == '.' && std::strtol(rest + 1, nullptr, 10) >= 24);
}

// The status for a release before API_VERSION.
inline Status* too_old(ApiBase const& base)
{
    // Every version has the function that makes a status, in the same place.
    return base.GetApi(1)->CreateStatus(NOT_IMPLEMENTED,
        (std::string("quartermap: this library needs ONNX Runtime 1.17 or newer; this is ") + base.GetVersionString())
            .c_str());
}

} // namespace quartermap::onnxruntime
