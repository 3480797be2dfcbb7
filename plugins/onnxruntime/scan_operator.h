// The operators SelectiveScan2D and SelectiveScan of the domain `quartermap`, for ONNX Runtime's CPU provider.
#pragma once

#include <cstdint>

#include "interface.h"

namespace quartermap::onnxruntime
{

// One operator for one element type. ONNX Runtime keeps its address: it lives as long as the library.
struct ScanOperator : Operator
{
    Api const* api;
    bool of_maps;      // SelectiveScan2D, or else SelectiveScan
    int element_type;  // of the maps: a TensorType
    std::int32_t threads; // of the sessions that it is registered for; 0 if nobody said
    bool infers;       // whether ONNX Runtime asks for the shape of the output
};

// Describes an operator. ONNX Runtime before 1.24 reads through a null pointer where an input of an operator that infers
// shapes has an empty name, so there `infers` has to be false; and a node must then say its `order`.
ScanOperator scan_operator(Api const& api, bool of_maps, int element_type, std::int32_t threads, bool infers);

// Forgets what this thread knows of the graphs that it has loaded: a load that failed may have left something behind.
void forget_orders();

} // namespace quartermap::onnxruntime
