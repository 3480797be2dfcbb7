#include "kernel_context.h"

#include <memory>

#include "status.h"

namespace quartermap::onnxruntime
{

std::string node_name(Api const& api, KernelInfo const* info)
{
    return read_text(
        api, [&](char* text, std::size_t* size) { return api.KernelInfo_GetNodeName(info, text, size); }, "");
}

Input read_input(Api const& api, KernelContext* context, std::size_t index)
{
    Input input;
    Value const* value = nullptr;
    check(api.KernelContext_GetInput(context, index, &value));
    if (value == nullptr)
    {
        return input;
    }
    TypeAndShape* info = nullptr;
    check(api.GetTensorTypeAndShape(value, &info));
    std::unique_ptr<TypeAndShape, void (*)(TypeAndShape*)> const owner(info, api.ReleaseTensorTypeAndShapeInfo);
    std::size_t rank = 0;
    check(api.GetDimensionsCount(info, &rank));
    input.sizes.resize(rank);
    check(api.GetDimensions(info, input.sizes.data(), rank));
    void* data = nullptr;
    check(api.GetTensorMutableData(const_cast<Value*>(value), &data));
    input.present = true;
    input.data = data;
    return input;
}

void* make_output(Api const& api, KernelContext* context, std::vector<std::int64_t> const& sizes)
{
    Value* output = nullptr;
    check(api.KernelContext_GetOutput(context, 0, sizes.data(), sizes.size(), &output));
    void* data = nullptr;
    check(api.GetTensorMutableData(output, &data));
    return data;
}

std::int32_t run_in_pool(void* given, QuartermapCpuTask task, void* argument, std::size_t count)
{
    Pool& pool = *static_cast<Pool*>(given);
    pool.status = pool.api->KernelContext_ParallelFor(pool.context, task, count, 0, argument);
    return pool.status != nullptr ? 1 : 0;
}

void check_call(Pool const& pool, std::int32_t status)
{
    check(pool.status);
    if (status != QUARTERMAP_CPU_SUCCESS)
    {
        throw Refusal{RUNTIME_EXCEPTION, quartermap_cpu_message(status)};
    }
}

} // namespace quartermap::onnxruntime
