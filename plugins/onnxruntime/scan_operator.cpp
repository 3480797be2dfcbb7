#include "scan_operator.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernel_context.h"
#include "operator_defaults.h"
#include "quartermap/cpu_scan.h"
#include "shapes.h"
#include "status.h"

namespace quartermap::onnxruntime
{
namespace
{

constexpr char const* DIRECTIONS[] = {"row", "column", "row_reverse", "column_reverse"};
constexpr char const* VMAMBA_ORDER = "row,column,row_reverse,column_reverse";
constexpr std::size_t MAP_INPUTS = 8;
constexpr std::size_t SEQUENCE_INPUTS = 7;

char const* name_of(ScanOperator const& op)
{
    return op.of_maps ? "SelectiveScan2D" : "SelectiveScan";
}

std::int32_t kernel_type(int element_type)
{
    switch (element_type)
    {
    case FLOAT16: return QUARTERMAP_CPU_FLOAT16;
    case BFLOAT16: return QUARTERMAP_CPU_BFLOAT16;
    case FLOAT64: return QUARTERMAP_CPU_FLOAT64;
    default: return QUARTERMAP_CPU_FLOAT32;
    }
}

// Whether an input is a map, or the projection of one, and so has the element type of the operator.
bool is_map(ScanOperator const& op, std::size_t index)
{
    if (op.of_maps)
    {
        return index < 4 || index == MAP_INPUTS - 1;
    }
    return index != 2 && index < 5;
}

// "row,column" as codes of directions.
std::vector<std::int32_t> parse_order(std::string const& text)
{
    std::vector<std::int32_t> codes;
    for (std::size_t begin = 0; begin <= text.size();)
    {
        std::size_t const end = std::min(text.find(',', begin), text.size());
        std::string const name = text.substr(begin, end - begin);
        std::size_t const before = codes.size();
        for (std::int32_t code = 0; code < 4; ++code)
        {
            if (name == DIRECTIONS[code])
            {
                codes.push_back(code);
            }
        }
        if (codes.size() == before)
        {
            throw Refusal{INVALID_ARGUMENT,
                "unknown scan direction '" + name + "'; expected row, column, row_reverse or column_reverse"};
        }
        begin = end + 1;
    }
    return codes;
}

// The orders of the nodes of the graph that this thread is loading: ONNX Runtime infers the shapes of all nodes, and then
// makes the kernels, on one thread.
class Orders
{
public:
    // A node is said to have one order, and has another.
    void note(std::string const& said, std::string const& meant)
    {
        if (mMaking)
        {
            mWrong.clear();
            mMaking = false;
        }
        if (said != meant)
        {
            mWrong[said] = meant;
        }
    }

    // Refuses an order which is not what a node means by it.
    void check(std::string const& said)
    {
        mMaking = true;
        auto const wrong = mWrong.find(said);
        if (wrong != mWrong.end())
        {
            throw Refusal{NOT_IMPLEMENTED,
                "quartermap.SelectiveScan2D: the directions of a node are '" + wrong->second
                    + "', and its attribute `order` says '" + said
                    + "' or is missing; compile the model anew, or run it without this library"};
        }
    }

private:
    std::map<std::string, std::string> mWrong;
    bool mMaking{false};
};

Orders& orders_of_this_load()
{
    static thread_local Orders orders;
    return orders;
}

struct Kernel
{
    ScanOperator const* op;
    std::string node;
    std::vector<std::int32_t> directions;
    bool softplus;
};

std::unique_ptr<Kernel> make_kernel(ScanOperator const& op, KernelInfo const* info)
{
    Api const& api = *op.api;
    auto kernel = std::make_unique<Kernel>();
    kernel->op = &op;
    kernel->node = node_name(api, info);
    std::int64_t softplus = op.of_maps ? 1 : 0;
    char const* const attribute = op.of_maps ? "softplus" : "delta_softplus";
    if (Status* const status = api.KernelInfoGetAttribute_int64(info, attribute, &softplus))
    {
        api.ReleaseStatus(status);
        softplus = op.of_maps ? 1 : 0;
    }
    kernel->softplus = softplus != 0;
    kernel->directions = {QUARTERMAP_CPU_ROW};
    if (op.of_maps)
    {
        std::string const order = read_text(
            api,
            [&](char* text, std::size_t* size)
            { return api.KernelInfoGetAttribute_string(info, "order", text, size); },
            op.infers ? VMAMBA_ORDER : "");
        if (order.empty())
        {
            throw Refusal{NOT_IMPLEMENTED,
                "quartermap.SelectiveScan2D: the attribute `order` of a node is empty, or missing, which it must not be before "
                "ONNX Runtime 1.24; compile the model anew, or run it without this library"};
        }
        orders_of_this_load().check(order);
        kernel->directions = parse_order(order);
    }
    return kernel;
}

QuartermapCpuTensors tensors_of(ScanOperator const& op, std::vector<Input> const& inputs, void* y)
{
    auto const at = [&](std::size_t i) { return inputs[i].data; };
    auto const floats = [&](std::size_t i) { return static_cast<float const*>(inputs[i].data); };
    if (op.of_maps)
    {
        return {at(0), at(1), at(2), at(3), floats(4), floats(5), floats(6), at(7), y};
    }
    return {at(0), at(1), at(3), at(4), floats(2), floats(5), floats(6), nullptr, y};
}

void compute(Kernel const& kernel, KernelContext* context)
{
    ScanOperator const& op = *kernel.op;
    Api const& api = *op.api;
    std::vector<Input> inputs(op.of_maps ? MAP_INPUTS : SEQUENCE_INPUTS);
    std::size_t given = 0;
    check(api.KernelContext_GetInputCount(context, &given));
    for (std::size_t i = 0; i < inputs.size() && i < given; ++i)
    {
        inputs[i] = read_input(api, context, i);
    }
    QuartermapCpuScan scan = op.of_maps ? map_sizes(inputs, static_cast<std::int64_t>(kernel.directions.size()))
                                        : sequence_sizes(inputs);
    scan.directions = kernel.directions.data();
    scan.direction_count = static_cast<std::int32_t>(kernel.directions.size());
    scan.softplus = kernel.softplus ? 1 : 0;
    scan.element_type = kernel_type(op.element_type);
    scan.threads = op.threads;

    QuartermapCpuTensors const tensors = tensors_of(op, inputs, make_output(api, context, inputs[0].sizes));
    Pool pool{&api, context, nullptr};
    check_call(pool, quartermap_cpu_scan(&scan, &tensors, run_in_pool, &pool));
}

Status* QUARTERMAP_ORT_CALL create_kernel(Operator const* given, Api const* api, KernelInfo const* info, void** kernel)
{
    *kernel = nullptr;
    return guarded(*api, [&] { *kernel = make_kernel(*static_cast<ScanOperator const*>(given), info).release(); });
}

Status* QUARTERMAP_ORT_CALL run_kernel(void* given, KernelContext* context)
{
    Kernel const& kernel = *static_cast<Kernel const*>(given);
    return guarded(
        *kernel.op->api, [&] { named(name_of(*kernel.op), kernel.node, [&] { compute(kernel, context); }); });
}

void QUARTERMAP_ORT_CALL destroy_kernel(void* kernel)
{
    delete static_cast<Kernel*>(kernel);
}

// An attribute of a node whose shape is being inferred, or null if the node has none of that name.
Attribute const* attribute_of(Api const& api, ShapeContext const* context, char const* name)
{
    Attribute const* found = nullptr;
    if (Status* const status = api.ShapeInferContext_GetAttribute(context, name, &found))
    {
        api.ReleaseStatus(status);
        return nullptr;
    }
    return found;
}

// The bytes of an attribute; strings have a NUL behind each.
std::string bytes_of(Api const& api, Attribute const* attribute, int type)
{
    std::size_t bytes = 0;
    char first = '\0';
    // Too little room is an error that tells how much there has to be.
    Status* const status = api.ReadOpAttr(attribute, type, &first, sizeof(first), &bytes);
    if (status == nullptr)
    {
        return std::string(bytes > 0 ? 1 : 0, first);
    }
    api.ReleaseStatus(status);
    std::string text(bytes, '\0');
    check(api.ReadOpAttr(attribute, type, text.data(), text.size(), &bytes));
    return text;
}

// The list `directions` of a node as one text, "row,column".
std::string joined_directions(Api const& api, Attribute const* attribute)
{
    std::string text = bytes_of(api, attribute, ATTRIBUTE_STRINGS);
    while (!text.empty() && text.back() == '\0')
    {
        text.pop_back();
    }
    std::replace(text.begin(), text.end(), '\0', ',');
    return text;
}

// `directions` is what the operator is defined by, and `order` the same in a form that kernels can read; without it, the
// order is that of VMamba. What ONNX Runtime does with an error of this function is nothing, so a node for which the two
// differ is written down, and no kernel is made for such a node.
void note_order(Api const& api, ShapeContext const* context)
{
    Attribute const* const directions = attribute_of(api, context, "directions");
    if (directions != nullptr)
    {
        Attribute const* const order = attribute_of(api, context, "order");
        std::string const read = order != nullptr ? bytes_of(api, order, ATTRIBUTE_STRING) : VMAMBA_ORDER;
        orders_of_this_load().note(read, joined_directions(api, directions));
    }
}

Status* QUARTERMAP_ORT_CALL infer_shape(Operator const* given, ShapeContext* context)
{
    ScanOperator const& op = *static_cast<ScanOperator const*>(given);
    Api const& api = *op.api;
    return guarded(api,
        [&]
        {
            if (op.of_maps)
            {
                note_order(api, context);
            }
            keep_shape(api, context);
        });
}

} // namespace

void forget_orders()
{
    orders_of_this_load() = Orders{};
}

ScanOperator scan_operator(Api const& api, bool of_maps, int element_type, std::int32_t threads, bool infers)
{
    ScanOperator op{};
    set_defaults(op);
    op.api = &api;
    op.of_maps = of_maps;
    op.element_type = element_type;
    op.threads = threads;
    op.infers = infers;
    op.GetName = [](Operator const* self) { return name_of(*static_cast<ScanOperator const*>(self)); };
    op.GetInputType = [](Operator const* self, std::size_t index)
    {
        ScanOperator const& own = *static_cast<ScanOperator const*>(self);
        return is_map(own, index) ? own.element_type : static_cast<int>(FLOAT32);
    };
    op.GetInputTypeCount = [](Operator const* self)
    { return static_cast<ScanOperator const*>(self)->of_maps ? MAP_INPUTS : SEQUENCE_INPUTS; };
    op.GetOutputType = [](Operator const* self, std::size_t)
    { return static_cast<ScanOperator const*>(self)->element_type; };
    op.KernelDestroy = destroy_kernel;
    op.GetInputCharacteristic = [](Operator const* self, std::size_t index) -> int
    { return index >= (static_cast<ScanOperator const*>(self)->of_maps ? 7 : 5) ? OPTIONAL : REQUIRED; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = run_kernel;
    op.InferOutputShapeFn = infers ? infer_shape : nullptr;
    return op;
}

} // namespace quartermap::onnxruntime
