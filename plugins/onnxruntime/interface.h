// ONNX Runtime's C interface, version 17 (ONNX Runtime 1.17 and newer), as far as it is needed here: the places of some
// functions in its table, and the structure that describes a custom operator. Both keep their layout in later versions.
//
// Declared here so that a C++ compiler is all that building needs. `tests/native/compare_interface.cpp` compares every
// offset and value with the real header, where that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32) && !defined(_WIN64)
#define QUARTERMAP_ORT_CALL __stdcall
#else
#define QUARTERMAP_ORT_CALL
#endif

namespace quartermap::onnxruntime
{

constexpr std::uint32_t API_VERSION = 17;

enum ErrorCode
{
    FAIL = 1,
    INVALID_ARGUMENT = 2,
    RUNTIME_EXCEPTION = 6,
    NOT_IMPLEMENTED = 9
};

enum TensorType
{
    FLOAT32 = 1,
    FLOAT16 = 10,
    FLOAT64 = 11,
    BFLOAT16 = 16
};

enum AttributeType
{
    ATTRIBUTE_INT = 1,
    ATTRIBUTE_STRING = 5,
    ATTRIBUTE_STRINGS = 6
};

enum Presence
{
    REQUIRED = 0,
    OPTIONAL = 1
};

struct Status;
struct Options;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Attribute;
struct Value;
struct TypeAndShape;
struct Operator;

// The table of functions. `gap_a_b` stands for the functions a to b, which are not needed.
struct Api
{
    Status*(QUARTERMAP_ORT_CALL* CreateStatus)(int code, char const* message); // 0
    void* gap_1_25[25];
    Status*(QUARTERMAP_ORT_CALL* CreateCustomOpDomain)(char const* name, Domain** domain); // 26
    Status*(QUARTERMAP_ORT_CALL* CustomOpDomain_Add)(Domain* domain, Operator const* op);
    Status*(QUARTERMAP_ORT_CALL* AddCustomOpDomain)(Options* options, Domain* domain);
    void* gap_29_50[22];
    Status*(QUARTERMAP_ORT_CALL* GetTensorMutableData)(Value* value, void** data); // 51
    void* gap_52_60[9];
    Status*(QUARTERMAP_ORT_CALL* GetDimensionsCount)(TypeAndShape const* info, std::size_t* rank); // 61
    Status*(QUARTERMAP_ORT_CALL* GetDimensions)(TypeAndShape const* info, std::int64_t* sizes, std::size_t rank);
    void* gap_63_64[2];
    Status*(QUARTERMAP_ORT_CALL* GetTensorTypeAndShape)(Value const* value, TypeAndShape** info); // 65
    void* gap_66_84[19];
    Status*(QUARTERMAP_ORT_CALL* KernelInfoGetAttribute_float)( // 85
        KernelInfo const* info, char const* name, float* value);
    Status*(QUARTERMAP_ORT_CALL* KernelInfoGetAttribute_int64)(
        KernelInfo const* info, char const* name, std::int64_t* value);
    Status*(QUARTERMAP_ORT_CALL* KernelInfoGetAttribute_string)(
        KernelInfo const* info, char const* name, char* text, std::size_t* size);
    Status*(QUARTERMAP_ORT_CALL* KernelContext_GetInputCount)(KernelContext const* context, std::size_t* count);
    void* gap_89;
    Status*(QUARTERMAP_ORT_CALL* KernelContext_GetInput)( // 90
        KernelContext const* context, std::size_t index, Value const** value);
    Status*(QUARTERMAP_ORT_CALL* KernelContext_GetOutput)(
        KernelContext* context, std::size_t index, std::int64_t const* sizes, std::size_t rank, Value** value);
    void* gap_92;
    void(QUARTERMAP_ORT_CALL* ReleaseStatus)(Status* status); // 93
    void* gap_94_98[5];
    void(QUARTERMAP_ORT_CALL* ReleaseTensorTypeAndShapeInfo)(TypeAndShape* info); // 99
    void* gap_100;
    void(QUARTERMAP_ORT_CALL* ReleaseCustomOpDomain)(Domain* domain); // 101
    void* gap_102_237[136];
    Status*(QUARTERMAP_ORT_CALL* GetSessionConfigEntry)( // 238
        Options const* options, char const* key, char* text, std::size_t* size);
    void* gap_239_243[5];
    Status*(QUARTERMAP_ORT_CALL* KernelInfo_GetNodeName)( // 244
        KernelInfo const* info, char* text, std::size_t* size);
    void* gap_245_266[22];
    Status*(QUARTERMAP_ORT_CALL* ShapeInferContext_GetInputCount)(ShapeContext const* context, std::size_t* count); // 267
    Status*(QUARTERMAP_ORT_CALL* ShapeInferContext_GetInputTypeShape)(
        ShapeContext const* context, std::size_t index, TypeAndShape** info);
    Status*(QUARTERMAP_ORT_CALL* ShapeInferContext_GetAttribute)(
        ShapeContext const* context, char const* name, Attribute const** attribute);
    Status*(QUARTERMAP_ORT_CALL* ShapeInferContext_SetOutputTypeShape)(
        ShapeContext const* context, std::size_t index, TypeAndShape const* info);
    void* gap_271;
    Status*(QUARTERMAP_ORT_CALL* ReadOpAttr)( // 272
        Attribute const* attribute, int type, void* data, std::size_t bytes, std::size_t* written);
    void* gap_273;
    Status*(QUARTERMAP_ORT_CALL* KernelContext_ParallelFor)( // 274
        KernelContext const* context, void (*task)(void*, std::size_t), std::size_t count, std::size_t batches,
        void* argument);
};

// Where ONNX Runtime hands out the table of a version.
struct ApiBase
{
    Api const*(QUARTERMAP_ORT_CALL* GetApi)(std::uint32_t version);
    char const*(QUARTERMAP_ORT_CALL* GetVersionString)();
};

// A custom operator: what ONNX Runtime asks, and calls.
struct Operator
{
    std::uint32_t version;
    void*(QUARTERMAP_ORT_CALL* CreateKernel)(Operator const*, Api const*, KernelInfo const*);
    char const*(QUARTERMAP_ORT_CALL* GetName)(Operator const*);
    char const*(QUARTERMAP_ORT_CALL* GetExecutionProviderType)(Operator const*);
    int(QUARTERMAP_ORT_CALL* GetInputType)(Operator const*, std::size_t);
    std::size_t(QUARTERMAP_ORT_CALL* GetInputTypeCount)(Operator const*);
    int(QUARTERMAP_ORT_CALL* GetOutputType)(Operator const*, std::size_t);
    std::size_t(QUARTERMAP_ORT_CALL* GetOutputTypeCount)(Operator const*);
    void(QUARTERMAP_ORT_CALL* KernelCompute)(void*, KernelContext*);
    void(QUARTERMAP_ORT_CALL* KernelDestroy)(void*);
    int(QUARTERMAP_ORT_CALL* GetInputCharacteristic)(Operator const*, std::size_t);
    int(QUARTERMAP_ORT_CALL* GetOutputCharacteristic)(Operator const*, std::size_t);
    int(QUARTERMAP_ORT_CALL* GetInputMemoryType)(Operator const*, std::size_t);
    int(QUARTERMAP_ORT_CALL* GetVariadicInputMinArity)(Operator const*);
    int(QUARTERMAP_ORT_CALL* GetVariadicInputHomogeneity)(Operator const*);
    int(QUARTERMAP_ORT_CALL* GetVariadicOutputMinArity)(Operator const*);
    int(QUARTERMAP_ORT_CALL* GetVariadicOutputHomogeneity)(Operator const*);
    Status*(QUARTERMAP_ORT_CALL* CreateKernelV2)(Operator const*, Api const*, KernelInfo const*, void**);
    Status*(QUARTERMAP_ORT_CALL* KernelComputeV2)(void*, KernelContext*);
    Status*(QUARTERMAP_ORT_CALL* InferOutputShapeFn)(Operator const*, ShapeContext*);
    int(QUARTERMAP_ORT_CALL* GetStartVersion)(Operator const*);
    int(QUARTERMAP_ORT_CALL* GetEndVersion)(Operator const*);
    // Read in versions from 18 on only.
    void* in_place[4];
};

} // namespace quartermap::onnxruntime
