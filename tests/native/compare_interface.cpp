// Compares what plugins/onnxruntime/interface.h declares of ONNX Runtime with its real header, at compile time: the place
// of every function and member, the values of every constant, and the sizes of what goes over the border.
#include <cstddef>

#include <onnxruntime/onnxruntime_c_api.h>

#include "interface.h"

namespace ours = quartermap::onnxruntime;

#define SAME_PLACE(own, theirs, member)                                                                                \
    static_assert(offsetof(own, member) == offsetof(theirs, member), #own "::" #member " lies elsewhere");            \
    static_assert(sizeof(own::member) == sizeof(theirs::member), #own "::" #member " has another size")
#define IN_TABLE(function) SAME_PLACE(ours::Api, OrtApi, function)
#define IN_OPERATOR(function) SAME_PLACE(ours::Operator, OrtCustomOp, function)
#define SAME_VALUE(own, theirs) static_assert(static_cast<int>(own) == static_cast<int>(theirs), #own " is another number")

// A newer header may have more functions behind those of version 17, never fewer.
static_assert(ORT_API_VERSION >= 17, "this header is older than the interface that is declared");
static_assert(ours::API_VERSION == 17, "change what is compared, too");
static_assert(sizeof(ours::Api) <= sizeof(OrtApi), "the table is longer than the real one");

IN_TABLE(CreateStatus);
IN_TABLE(CreateCustomOpDomain);
IN_TABLE(CustomOpDomain_Add);
IN_TABLE(AddCustomOpDomain);
IN_TABLE(GetTensorMutableData);
IN_TABLE(GetDimensionsCount);
IN_TABLE(GetDimensions);
IN_TABLE(GetTensorTypeAndShape);
IN_TABLE(KernelInfoGetAttribute_float);
IN_TABLE(KernelInfoGetAttribute_int64);
IN_TABLE(KernelInfoGetAttribute_string);
IN_TABLE(KernelContext_GetInputCount);
IN_TABLE(KernelContext_GetInput);
IN_TABLE(KernelContext_GetOutput);
IN_TABLE(ReleaseStatus);
IN_TABLE(ReleaseTensorTypeAndShapeInfo);
IN_TABLE(ReleaseCustomOpDomain);
IN_TABLE(GetSessionConfigEntry);
IN_TABLE(KernelInfo_GetNodeName);
IN_TABLE(ShapeInferContext_GetInputCount);
IN_TABLE(ShapeInferContext_GetInputTypeShape);
IN_TABLE(ShapeInferContext_GetAttribute);
IN_TABLE(ShapeInferContext_SetOutputTypeShape);
IN_TABLE(ReadOpAttr);
IN_TABLE(KernelContext_ParallelFor);

SAME_PLACE(ours::ApiBase, OrtApiBase, GetApi);
SAME_PLACE(ours::ApiBase, OrtApiBase, GetVersionString);

IN_OPERATOR(version);
IN_OPERATOR(CreateKernel);
IN_OPERATOR(GetName);
IN_OPERATOR(GetExecutionProviderType);
IN_OPERATOR(GetInputType);
IN_OPERATOR(GetInputTypeCount);
IN_OPERATOR(GetOutputType);
IN_OPERATOR(GetOutputTypeCount);
IN_OPERATOR(KernelCompute);
IN_OPERATOR(KernelDestroy);
IN_OPERATOR(GetInputCharacteristic);
IN_OPERATOR(GetOutputCharacteristic);
IN_OPERATOR(GetInputMemoryType);
IN_OPERATOR(GetVariadicInputMinArity);
IN_OPERATOR(GetVariadicInputHomogeneity);
IN_OPERATOR(GetVariadicOutputMinArity);
IN_OPERATOR(GetVariadicOutputHomogeneity);
IN_OPERATOR(CreateKernelV2);
IN_OPERATOR(KernelComputeV2);
IN_OPERATOR(InferOutputShapeFn);
IN_OPERATOR(GetStartVersion);
IN_OPERATOR(GetEndVersion);

SAME_VALUE(ours::FAIL, ORT_FAIL);
SAME_VALUE(ours::INVALID_ARGUMENT, ORT_INVALID_ARGUMENT);
SAME_VALUE(ours::RUNTIME_EXCEPTION, ORT_RUNTIME_EXCEPTION);
SAME_VALUE(ours::NOT_IMPLEMENTED, ORT_NOT_IMPLEMENTED);
SAME_VALUE(ours::FLOAT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
SAME_VALUE(ours::FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
SAME_VALUE(ours::FLOAT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE);
SAME_VALUE(ours::BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
SAME_VALUE(ours::ATTRIBUTE_INT, ORT_OP_ATTR_INT);
SAME_VALUE(ours::ATTRIBUTE_STRING, ORT_OP_ATTR_STRING);
SAME_VALUE(ours::ATTRIBUTE_STRINGS, ORT_OP_ATTR_STRINGS);
SAME_VALUE(ours::REQUIRED, INPUT_OUTPUT_REQUIRED);
SAME_VALUE(ours::OPTIONAL, INPUT_OUTPUT_OPTIONAL);

// Enumerations go over the border as int.
static_assert(sizeof(ONNXTensorElementDataType) == sizeof(int), "element types are no int");
static_assert(sizeof(OrtCustomOpInputOutputCharacteristic) == sizeof(int), "characteristics are no int");
static_assert(sizeof(OrtMemType) == sizeof(int), "kinds of memory are no int");
static_assert(sizeof(OrtErrorCode) == sizeof(int), "error codes are no int");
static_assert(sizeof(OrtOpAttrType) == sizeof(int), "types of attributes are no int");
static_assert(sizeof(ours::Operator) >= offsetof(OrtCustomOp, GetEndVersion) + sizeof(OrtCustomOp::GetEndVersion),
    "the structure is shorter than version 17 of the real one");

#if defined(QUARTERMAP_PLANTED_FAULT)
SAME_PLACE(ours::ApiBase, OrtApiBase, GetApi);
static_assert(offsetof(ours::Api, ReleaseStatus) == offsetof(OrtApi, ReleaseValue), "a planted fault");
#endif
