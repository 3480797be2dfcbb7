#include "plugin.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "log.h"

namespace quartermap
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace
{

constexpr std::int32_t kFailure = -1;

// Fields ---------------------------------------------------------------------------------------------------------------

int direction_of(char const* name, std::size_t length) noexcept
{
    for (int d = 0; d < 4; ++d)
    {
        if (std::strlen(kDirectionNames[d]) == length && std::strncmp(kDirectionNames[d], name, length) == 0)
        {
            return d;
        }
    }
    return -1;
}

bool read_directions(PluginField const& field, Fields& fields) noexcept
{
    if (field.type != PluginFieldType::kCHAR || (field.data == nullptr && field.length > 0))
    {
        log_error("the field '%s' has to hold names (type CHAR); its type is %d", kDirectionsField,
            static_cast<int>(field.type));
        return false;
    }
    auto const* const text = static_cast<char const*>(field.data);
    fields.direction_count = 0;
    for (std::int32_t begin = 0; begin < field.length;)
    {
        std::int32_t end = begin;
        while (end < field.length && text[end] != '\0' && text[end] != ',')
        {
            ++end;
        }
        if (end > begin)
        {
            int const direction = direction_of(text + begin, static_cast<std::size_t>(end - begin));
            if (direction < 0)
            {
                log_error("unknown direction '%.*s'; expected row, column, row_reverse or column_reverse",
                    static_cast<int>(end - begin), text + begin);
                return false;
            }
            if (fields.direction_count == QUARTERMAP_MAX_DIRECTIONS)
            {
                log_error("more than %d directions", QUARTERMAP_MAX_DIRECTIONS);
                return false;
            }
            fields.directions[fields.direction_count++] = direction;
        }
        begin = end + 1;
    }
    if (fields.direction_count == 0)
    {
        log_error("the field '%s' is empty; expected names such as row,column", kDirectionsField);
    }
    return fields.direction_count > 0;
}

bool read_softplus(PluginField const& field, Fields& fields) noexcept
{
    bool const wide = field.type == PluginFieldType::kINT64;
    if ((!wide && field.type != PluginFieldType::kINT32) || field.data == nullptr || field.length != 1)
    {
        log_error("the field '%s' has to be one whole number (type INT32); its type is %d, its length %d",
            kSoftplusField, static_cast<int>(field.type), static_cast<int>(field.length));
        return false;
    }
    std::int64_t value = 0;
    std::int32_t narrow = 0;
    std::memcpy(wide ? static_cast<void*>(&value) : &narrow, field.data, wide ? sizeof value : sizeof narrow);
    value = wide ? value : narrow;
    if (value != 0 && value != 1)
    {
        log_error("the field '%s' is %lld; expected 0 or 1", kSoftplusField, static_cast<long long>(value));
        return false;
    }
    fields.softplus = static_cast<std::int32_t>(value);
    return true;
}

// Shapes ---------------------------------------------------------------------------------------------------------------

bool known_inputs(std::int32_t inputs, std::int32_t outputs) noexcept
{
    bool const fine = (inputs == kFewestInputs || inputs == kMostInputs) && outputs == 1;
    if (!fine)
    {
        log_error("%d inputs and %d outputs; expected x, dt, B, C, A, D, dt_bias, perhaps dt_weight, and y",
            static_cast<int>(inputs), static_cast<int>(outputs));
    }
    return fine;
}

// Whether a dimension is what it has to be; a size that is not known yet (-1) is.
bool agrees(Dims const& dims, int axis, std::int64_t expected, char const* tensor) noexcept
{
    std::int64_t const found = dims.d[axis];
    if (found >= 0 && expected >= 0 && found != expected)
    {
        log_error("axis %d of %s is %lld; expected %lld", axis, tensor, static_cast<long long>(found),
            static_cast<long long>(expected));
        return false;
    }
    return true;
}

std::int64_t times(std::int64_t a, std::int64_t b) noexcept
{
    return a < 0 || b < 0 ? -1 : a * b;
}

std::int32_t element_type_of(DataType type) noexcept
{
    switch (type)
    {
    case DataType::kFLOAT: return QUARTERMAP_FLOAT32;
    case DataType::kHALF: return QUARTERMAP_FLOAT16;
    case DataType::kBF16: return QUARTERMAP_BFLOAT16;
    default: return -1;
    }
}

// Reads the scan from the tensors' sizes; false, with the reason logged, if they do not fit each other. Sizes that are not
// known yet stay -1. `dims(i)` gives the sizes of input i.
template <typename DimsOf>
bool read_scan(
    Fields const& fields, std::int32_t inputs, DimsOf const& dims, DataType type, QuartermapScan& scan) noexcept
{
    constexpr int kRanks[kMostInputs] = {4, 4, 4, 4, 2, 1, 1, 2};
    for (std::int32_t i = 0; i < inputs; ++i)
    {
        if (dims(i).nbDims != kRanks[i])
        {
            log_error("%s has %d axes; expected %d", kInputs[i].name, static_cast<int>(dims(i).nbDims), kRanks[i]);
            return false;
        }
    }
    std::memset(&scan, 0, sizeof scan);
    Dims const& x = dims(kX);
    scan.batch = x.d[0];
    scan.d_inner = x.d[1];
    scan.height = x.d[2];
    scan.width = x.d[3];
    scan.d_state = dims(kA).d[1];
    scan.dt_rank = inputs == kMostInputs ? dims(kDtWeight).d[1] : 0;
    scan.direction_count = fields.direction_count;
    std::memcpy(scan.directions, fields.directions, sizeof scan.directions);
    scan.softplus = fields.softplus;
    scan.element_type = element_type_of(type);

    if (inputs == kMostInputs && scan.dt_rank == 0)
    {
        log_error("%s has no columns; leave it out if dt is the full time-step map", kInputs[kDtWeight].name);
        return false;
    }
    std::int64_t const k = fields.direction_count;
    std::int64_t const wide = times(k, scan.d_inner);
    std::int64_t const channels[4]
        = {scan.d_inner, inputs == kMostInputs ? times(k, scan.dt_rank) : wide, times(k, scan.d_state),
            times(k, scan.d_state)};
    bool fine = true;
    for (int i = kDt; i <= kC && fine; ++i)
    {
        fine = agrees(dims(i), 0, scan.batch, kInputs[i].name) && agrees(dims(i), 1, channels[i], kInputs[i].name)
            && agrees(dims(i), 2, scan.height, kInputs[i].name) && agrees(dims(i), 3, scan.width, kInputs[i].name);
    }
    for (int i = kA; i < inputs && fine; ++i)
    {
        fine = agrees(dims(i), 0, wide, kInputs[i].name);
    }
    return fine;
}

bool same(QuartermapScan const& a, QuartermapScan const& b) noexcept
{
    return a.batch == b.batch && a.d_inner == b.d_inner && a.height == b.height && a.width == b.width
        && a.d_state == b.d_state && a.dt_rank == b.dt_rank && a.direction_count == b.direction_count
        && std::equal(a.directions, a.directions + a.direction_count, b.directions) && a.softplus == b.softplus
        && a.element_type == b.element_type;
}

} // namespace

bool read_fields(nvinfer1::PluginFieldCollection const* collection, Fields& fields) noexcept
{
    if (collection == nullptr || (collection->nbFields > 0 && collection->fields == nullptr))
    {
        log_error("created without fields; expected '%s' and '%s'", kDirectionsField, kSoftplusField);
        return false;
    }
    bool directions = false;
    bool softplus = false;
    for (std::int32_t i = 0; i < collection->nbFields; ++i)
    {
        PluginField const& field = collection->fields[i];
        char const* const name = field.name == nullptr ? "" : field.name;
        bool fine = false;
        if (std::strcmp(name, kDirectionsField) == 0)
        {
            fine = read_directions(field, fields);
            directions = true;
        }
        else if (std::strcmp(name, kSoftplusField) == 0)
        {
            fine = read_softplus(field, fields);
            softplus = true;
        }
        else
        {
            log_error("unknown field '%s'; expected '%s' and '%s'", name, kDirectionsField, kSoftplusField);
        }
        if (!fine)
        {
            return false;
        }
    }
    if (!directions || !softplus)
    {
        log_error("the field '%s' is missing", directions ? kSoftplusField : kDirectionsField);
    }
    return directions && softplus;
}

// The plugin -----------------------------------------------------------------------------------------------------------

SelectiveScan2D::SelectiveScan2D(Fields const& fields) noexcept
    : fields_(fields)
{
    for (std::int32_t k = 0; k < fields_.direction_count; ++k)
    {
        std::strcat(direction_names_, k == 0 ? "" : ",");
        std::strcat(direction_names_, kDirectionNames[fields_.directions[k]]);
    }
    auto const length = static_cast<std::int32_t>(std::strlen(direction_names_) + 1);
    serialized_[0] = PluginField(kDirectionsField, direction_names_, PluginFieldType::kCHAR, length);
    serialized_[1] = PluginField(kSoftplusField, &fields_.softplus, PluginFieldType::kINT32, 1);
    collection_.nbFields = 2;
    collection_.fields = serialized_;
    std::snprintf(description_, sizeof description_, "%s::%s/%s;%s=%s;%s=%d;kernels=%d", kPluginNamespace, kPluginName,
        kPluginVersion, kDirectionsField, direction_names_, kSoftplusField, static_cast<int>(fields_.softplus),
        QUARTERMAP_SELECTIVE_SCAN_VERSION);
}

nvinfer1::IPluginCapability* SelectiveScan2D::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* SelectiveScan2D::clone() noexcept
{
    auto* const copy = new (std::nothrow) SelectiveScan2D(fields_);
    if (copy != nullptr)
    {
        copy->plan_ = plan_;
    }
    return copy;
}

nvinfer1::AsciiChar const* SelectiveScan2D::getPluginName() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* SelectiveScan2D::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

nvinfer1::AsciiChar const* SelectiveScan2D::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

std::int32_t SelectiveScan2D::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /*out*/, std::int32_t nbOutputs) noexcept
{
    if (!known_inputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    auto const dims = [in](std::int32_t i) -> Dims const& { return in[i].desc.dims; };
    QuartermapScan scan;
    return read_scan(fields_, nbInputs, dims, in[kX].desc.type, scan) ? 0 : kFailure;
}

std::int32_t SelectiveScan2D::getOutputDataTypes(DataType* outputTypes, std::int32_t nbOutputs,
    DataType const* inputTypes, std::int32_t nbInputs) const noexcept
{
    if (!known_inputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    outputTypes[0] = inputTypes[kX];
    return 0;
}

std::int32_t SelectiveScan2D::getOutputShapes(nvinfer1::DimsExprs const* inputs, std::int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, std::int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    std::int32_t nbOutputs, nvinfer1::IExprBuilder& /*exprBuilder*/) noexcept
{
    if (!known_inputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    if (inputs[kX].nbDims != 4)
    {
        log_error("x has %d axes; expected (batch, d_inner, H, W)", static_cast<int>(inputs[kX].nbDims));
        return kFailure;
    }
    outputs[0] = inputs[kX];
    return 0;
}

bool SelectiveScan2D::supportsFormatCombination(std::int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
    std::int32_t nbInputs, std::int32_t nbOutputs) noexcept
{
    if ((nbInputs != kFewestInputs && nbInputs != kMostInputs) || nbOutputs != 1 || pos < 0 || pos > nbInputs)
    {
        return false;
    }
    nvinfer1::PluginTensorDesc const& tensor = inOut[pos].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    if (pos == kX)
    {
        return element_type_of(tensor.type) >= 0;
    }
    bool const as_x = pos == nbInputs || kInputs[pos].element_type;
    return tensor.type == (as_x ? inOut[kX].desc.type : DataType::kFLOAT);
}

std::int32_t SelectiveScan2D::getNbOutputs() const noexcept
{
    return 1;
}

std::size_t SelectiveScan2D::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, std::int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /*outputs*/, std::int32_t nbOutputs) const noexcept
{
    if (!known_inputs(nbInputs, nbOutputs))
    {
        return 0;
    }
    auto const dims = [inputs](std::int32_t i) -> Dims const& { return inputs[i].max; };
    QuartermapScan scan;
    bool const fine = read_scan(fields_, nbInputs, dims, inputs[kX].desc.type, scan);
    return fine ? static_cast<std::size_t>(quartermap_selective_scan_workspace(&scan)) : 0;
}

char const* SelectiveScan2D::getTimingCacheID() noexcept
{
    // TensorRT puts sizes, types and formats before it; what else decides the time is ours to say.
    return description_;
}

char const* SelectiveScan2D::getMetadataString() noexcept
{
    return description_;
}

std::int32_t SelectiveScan2D::onShapeChange(nvinfer1::PluginTensorDesc const* in, std::int32_t nbInputs,
    nvinfer1::PluginTensorDesc const* /*out*/, std::int32_t nbOutputs) noexcept
{
    if (!known_inputs(nbInputs, nbOutputs))
    {
        return kFailure;
    }
    auto const dims = [in](std::int32_t i) -> Dims const& { return in[i].dims; };
    QuartermapScan scan;
    if (!read_scan(fields_, nbInputs, dims, in[kX].type, scan))
    {
        plan_ = {};
        return kFailure;
    }
    // TensorRT calls this also when nothing but an address has changed.
    if (same(scan, plan_.scan))
    {
        return 0;
    }
    plan_ = {};
    QuartermapScanPlan plan{};
    std::int32_t status = quartermap_selective_scan_plan(&scan, &plan);
    if (status == QUARTERMAP_SUCCESS)
    {
        status = quartermap_selective_scan_prepare(&plan);
    }
    if (status != QUARTERMAP_SUCCESS)
    {
        log_error("cannot prepare %lld x %lld x %lld x %lld: %s", static_cast<long long>(scan.batch),
            static_cast<long long>(scan.d_inner), static_cast<long long>(scan.height),
            static_cast<long long>(scan.width), quartermap_selective_scan_message(status));
        return kFailure;
    }
    plan_ = plan;
    return 0;
}

std::int32_t SelectiveScan2D::enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
    nvinfer1::PluginTensorDesc const* /*outputDesc*/, void const* const* inputs, void* const* outputs, void* workspace,
    cudaStream_t stream) noexcept
{
    Dims const& x = inputDesc[kX].dims;
    QuartermapScan const& planned = plan_.scan;
    bool const current = planned.batch == x.d[0] && planned.d_inner == x.d[1] && planned.height == x.d[2]
        && planned.width == x.d[3] && planned.element_type == element_type_of(inputDesc[kX].type);
    if (!current)
    {
        // Planning here would load code, which may allocate and wait.
        log_error("enqueue for %lld x %lld x %lld x %lld, of which onShapeChange was not told",
            static_cast<long long>(x.d[0]), static_cast<long long>(x.d[1]), static_cast<long long>(x.d[2]),
            static_cast<long long>(x.d[3]));
        return kFailure;
    }
    QuartermapScanTensors tensors{};
    tensors.x = inputs[kX];
    tensors.dt = inputs[kDt];
    tensors.B = inputs[kB];
    tensors.C = inputs[kC];
    tensors.A = static_cast<float const*>(inputs[kA]);
    tensors.D = static_cast<float const*>(inputs[kD]);
    tensors.dt_bias = static_cast<float const*>(inputs[kDtBias]);
    tensors.dt_weight = planned.dt_rank > 0 ? inputs[kDtWeight] : nullptr;
    tensors.y = outputs[0];
    tensors.workspace = workspace;
    // What getWorkspaceSize asked for is at least what this plan needs; see launch_plan.h.
    tensors.workspace_bytes = workspace == nullptr ? 0 : plan_.workspace_bytes;
    std::int32_t const status = quartermap_selective_scan_launch(&plan_, &tensors, stream);
    if (status != QUARTERMAP_SUCCESS)
    {
        log_error("the kernel was not launched: %s", quartermap_selective_scan_message(status));
        return kFailure;
    }
    return 0;
}

nvinfer1::IPluginV3* SelectiveScan2D::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* SelectiveScan2D::getFieldsToSerialize() noexcept
{
    return &collection_;
}

// The creator ----------------------------------------------------------------------------------------------------------

SelectiveScan2DCreator::SelectiveScan2DCreator() noexcept
    : fields_{PluginField(kDirectionsField, nullptr, PluginFieldType::kCHAR, 1),
        PluginField(kSoftplusField, nullptr, PluginFieldType::kINT32, 1)}
{
    collection_.nbFields = 2;
    collection_.fields = fields_;
}

nvinfer1::IPluginV3* SelectiveScan2DCreator::createPlugin(nvinfer1::AsciiChar const* /*name*/,
    nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase /*phase*/) noexcept
{
    Fields fields;
    return read_fields(fc, fields) ? new (std::nothrow) SelectiveScan2D(fields) : nullptr;
}

nvinfer1::PluginFieldCollection const* SelectiveScan2DCreator::getFieldNames() noexcept
{
    return &collection_;
}

nvinfer1::AsciiChar const* SelectiveScan2DCreator::getPluginName() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* SelectiveScan2DCreator::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

nvinfer1::AsciiChar const* SelectiveScan2DCreator::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

} // namespace quartermap
