// What all of our operators answer alike when ONNX Runtime asks about them.
#pragma once

#include <limits>
#include <string>

#include "interface.h"
#include "status.h"

namespace quartermap::onnxruntime
{

// One output, no variadic inputs, every version, the CPU.
inline void set_defaults(Operator& op)
{
    op.version = API_VERSION;
    op.GetExecutionProviderType = [](Operator const*) -> char const* { return nullptr; };
    op.GetOutputTypeCount = [](Operator const*) -> std::size_t { return 1; };
    op.GetOutputCharacteristic = [](Operator const*, std::size_t) -> int { return REQUIRED; };
    op.GetInputMemoryType = [](Operator const*, std::size_t) { return 0; };
    op.GetVariadicInputMinArity = [](Operator const*) { return 1; };
    op.GetVariadicInputHomogeneity = [](Operator const*) { return 1; };
    op.GetVariadicOutputMinArity = [](Operator const*) { return 1; };
    op.GetVariadicOutputHomogeneity = [](Operator const*) { return 1; };
    op.GetStartVersion = [](Operator const*) { return 1; };
    op.GetEndVersion = [](Operator const*) { return std::numeric_limits<int>::max(); };
}

// The output has the shape of the first input.
inline void keep_shape(Api const& api, ShapeContext* context)
{
    TypeAndShape* info = nullptr;
    check(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
    check(api.ShapeInferContext_SetOutputTypeShape(context, 0, info));
}

// Runs a node; what it refuses names the node.
template <typename Function>
void named(char const* op, std::string const& node, Function const& function)
{
    try
    {
        function();
    }
    catch (Refusal const& error)
    {
        throw Refusal{error.code, std::string("quartermap.") + op + " node '" + node + "': " + error.message};
    }
}

} // namespace quartermap::onnxruntime
