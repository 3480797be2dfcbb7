#include "kernel_dispatch.h"

int quartermap::launch_float32(KernelArguments const& arguments, void* stream)
{
    return dispatch<float>(arguments, stream);
}
