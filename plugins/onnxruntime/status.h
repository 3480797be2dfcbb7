// Errors of ONNX Runtime, as exceptions on this side of its interface and as its own on the other.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

#include "interface.h"

namespace quartermap::onnxruntime
{

// An error with what is to be said of it.
struct Refusal
{
    int code;
    std::string message;
};

// An error that ONNX Runtime returned; it goes back as it is.
struct Returned
{
    Status* status;
};

inline void check(Status* status)
{
    if (status != nullptr)
    {
        throw Returned{status};
    }
}

// Calls a function, and turns whatever it throws into a status: nothing may leave a C function.
template <typename Function>
Status* guarded(Api const& api, Function const& function) noexcept
{
    try
    {
        function();
        return nullptr;
    }
    catch (Returned const& error)
    {
        return error.status;
    }
    catch (Refusal const& error)
    {
        return api.CreateStatus(error.code, error.message.c_str());
    }
    catch (std::exception const& error)
    {
        return api.CreateStatus(RUNTIME_EXCEPTION, error.what());
    }
    catch (...)
    {
        return api.CreateStatus(RUNTIME_EXCEPTION, "quartermap: unknown error");
    }
}

} // namespace quartermap::onnxruntime
