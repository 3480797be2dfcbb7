#include "kernel_dispatch.h"

int quartermap::launch_bfloat16(KernelArguments const& arguments, void* stream)
{
    return dispatch<BFloat16>(arguments, stream);
}
