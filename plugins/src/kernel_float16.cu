#include "kernel_dispatch.h"

int quartermap::launch_float16(KernelArguments const& arguments, void* stream)
{
    return dispatch<Float16>(arguments, stream);
}
