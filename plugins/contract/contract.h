// What the ONNX side and the plugin agree on: the operator's name, its fields and its inputs. quartermap_deploy/native/
// contract.py holds the same in Python, and `quartermap plugin check` compares the two.
#pragma once

#include "quartermap/selective_scan.h"

namespace quartermap
{

constexpr char kPluginName[] = "SelectiveScan2D";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "quartermap";

// Names separated by NUL, as TensorRT's ONNX parser passes an attribute of type STRINGS, or by commas.
constexpr char kDirectionsField[] = "directions";
// 0 or 1.
constexpr char kSoftplusField[] = "softplus";

constexpr char const* kDirectionNames[] = {"row", "column", "row_reverse", "column_reverse"};

enum Input
{
    kX = 0,
    kDt = 1,
    kB = 2,
    kC = 3,
    kA = 4,
    kD = 5,
    kDtBias = 6,
    kDtWeight = 7 // not there when dt is the full time-step map
};

struct TensorContract
{
    char const* name;
    bool element_type; // of the element type of x; else float32
    bool optional;
};

constexpr TensorContract kInputs[] = {
    {"x", true, false},
    {"dt", true, false},
    {"B", true, false},
    {"C", true, false},
    {"A", false, false},
    {"D", false, false},
    {"dt_bias", false, false},
    {"dt_weight", true, true},
};
constexpr int kMostInputs = 8;
constexpr int kFewestInputs = 7;

} // namespace quartermap

// The contract as JSON; never NULL, and good until the process ends. Needs no TensorRT and no device.
extern "C" QUARTERMAP_API char const* quartermap_plugin_contract(void);
