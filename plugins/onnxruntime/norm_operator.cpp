#include "norm_operator.h"

#include <memory>
#include <string>

#include "kernel_context.h"
#include "operator_defaults.h"
#include "quartermap/cpu_norm.h"
#include "shapes.h"
#include "status.h"

namespace quartermap::onnxruntime
{
namespace
{

constexpr char const* NAME = "LayerNormalization2D";
constexpr std::size_t INPUTS = 3;

struct Kernel
{
    NormOperator const* op;
    std::string node;
    float epsilon;
};

std::unique_ptr<Kernel> make_kernel(NormOperator const& op, KernelInfo const* info)
{
    auto kernel = std::make_unique<Kernel>();
    kernel->op = &op;
    kernel->node = node_name(*op.api, info);
    check(op.api->KernelInfoGetAttribute_float(info, "epsilon", &kernel->epsilon));
    return kernel;
}

void compute(Kernel const& kernel, KernelContext* context)
{
    Api const& api = *kernel.op->api;
    Input const x = read_input(api, context, 0);
    Input const scale = read_input(api, context, 1);
    Input const bias = read_input(api, context, 2);
    QuartermapCpuNorm norm = norm_sizes(x, scale, bias);
    norm.epsilon = kernel.epsilon;
    norm.threads = kernel.op->threads;
    norm.x = static_cast<float const*>(x.data);
    norm.scale = static_cast<float const*>(scale.data);
    norm.bias = static_cast<float const*>(bias.data);
    norm.y = static_cast<float*>(make_output(api, context, x.sizes));
    Pool pool{&api, context, nullptr};
    check_call(pool, quartermap_cpu_norm(&norm, run_in_pool, &pool));
}

Status* QUARTERMAP_ORT_CALL create_kernel(Operator const* given, Api const* api, KernelInfo const* info, void** kernel)
{
    *kernel = nullptr;
    return guarded(*api, [&] { *kernel = make_kernel(*static_cast<NormOperator const*>(given), info).release(); });
}

Status* QUARTERMAP_ORT_CALL run_kernel(void* given, KernelContext* context)
{
    Kernel const& kernel = *static_cast<Kernel const*>(given);
    return guarded(*kernel.op->api, [&] { named(NAME, kernel.node, [&] { compute(kernel, context); }); });
}

void QUARTERMAP_ORT_CALL destroy_kernel(void* kernel)
{
    delete static_cast<Kernel*>(kernel);
}

Status* QUARTERMAP_ORT_CALL infer_shape(Operator const* given, ShapeContext* context)
{
    Api const& api = *static_cast<NormOperator const*>(given)->api;
    return guarded(api, [&] { keep_shape(api, context); });
}

} // namespace

NormOperator norm_operator(Api const& api, std::int32_t threads)
{
    NormOperator op{};
    set_defaults(op);
    op.api = &api;
    op.threads = threads;
    op.GetName = [](Operator const*) { return NAME; };
    op.GetInputType = [](Operator const*, std::size_t) -> int { return FLOAT32; };
    op.GetInputTypeCount = [](Operator const*) { return INPUTS; };
    op.GetInputCharacteristic = [](Operator const*, std::size_t) -> int { return REQUIRED; };
    op.GetOutputType = [](Operator const*, std::size_t) -> int { return FLOAT32; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = run_kernel;
    op.KernelDestroy = destroy_kernel;
    op.InferOutputShapeFn = infer_shape;
    return op;
}

} // namespace quartermap::onnxruntime
