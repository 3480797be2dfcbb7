// Drives the plugin as TensorRT does, without TensorRT or through the registry of a real one: loads the library, takes its
// creator, makes plugins from fields, asks for shapes and formats, configures, clones, serialises and makes again, and runs
// the kernel: with one shape after another in one context, in clones, and in two threads.
//
//   quartermap_test_host [--registry TENSORRT] LIBRARY [GOLDEN_FOLDER]
//
// TENSORRT is a library such as libnvinfer_lean.so.11: its registry then loads LIBRARY, hands out the creator, and lets go
// of it at the end.
//
// The golden folder is written by test_host/write_golden.py. Its cases run on a GPU; in a library with emulated kernels
// they run on the CPU. Ends with 0 when all checks passed, 1 when one failed, and 77 when the host-side checks passed but
// the kernel could not be run for want of a GPU or of golden data.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <dlfcn.h>

#if !defined(QUARTERMAP_EMULATION)
#include <cuda_runtime_api.h>
#endif

#include "contract.h"
#include "interface.h"
#include "quartermap/selective_scan.h"
#include "registry.h"

using namespace nvinfer1;
using quartermap::kPluginNamespace;

namespace
{

int failures = 0;
int checks = 0;
unsigned (*preparations)() = nullptr; // how often the emulated device prepared a kernel; NULL for a real one

void check(bool passed, std::string const& what)
{
    ++checks;
    if (!passed)
    {
        ++failures;
        std::printf("FAILED: %s\n", what.c_str());
    }
}

// A plugin as the host holds it -------------------------------------------------------------------------------------------

struct Capabilities
{
    std::unique_ptr<IPluginV3> plugin;
    IPluginV3OneCore* core = nullptr;
    IPluginV3OneBuild* build = nullptr;
    IPluginV3OneRuntime* runtime = nullptr;

    explicit Capabilities(IPluginV3* made)
        : plugin(made)
    {
        if (made != nullptr)
        {
            core = static_cast<IPluginV3OneCore*>(made->getCapabilityInterface(PluginCapabilityType::kCORE));
            build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
            runtime = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        }
    }
};

struct FieldList
{
    std::vector<PluginField> fields;

    FieldList& directions(std::string const& names)
    {
        texts.push_back(std::make_unique<std::string>(names));
        fields.emplace_back("directions", texts.back()->data(), PluginFieldType::kCHAR,
            static_cast<std::int32_t>(texts.back()->size()));
        return *this;
    }
    FieldList& softplus(std::int32_t value)
    {
        numbers.push_back(std::make_unique<std::int32_t>(value));
        fields.emplace_back("softplus", numbers.back().get(), PluginFieldType::kINT32, 1);
        return *this;
    }
    FieldList& add(char const* name, void const* data, PluginFieldType type, std::int32_t length)
    {
        fields.emplace_back(name, data, type, length);
        return *this;
    }
    PluginFieldCollection collection() const
    {
        PluginFieldCollection result;
        result.nbFields = static_cast<std::int32_t>(fields.size());
        result.fields = fields.data();
        return result;
    }
    IPluginV3* create(IPluginCreatorV3One& creator, TensorRTPhase phase = TensorRTPhase::kBUILD) const
    {
        PluginFieldCollection const made = collection();
        return creator.createPlugin("scan", &made, phase);
    }

    std::vector<std::unique_ptr<std::string>> texts;
    std::vector<std::unique_ptr<std::int32_t>> numbers;
};

// As TensorRT's ONNX parser passes an attribute of type STRINGS: each name with a NUL behind it.
std::string const kAll = std::string("row") + '\0' + "column" + '\0' + "row_reverse" + '\0' + "column_reverse" + '\0';

std::string serialized_directions(Capabilities const& plugin)
{
    PluginFieldCollection const* fields = plugin.runtime->getFieldsToSerialize();
    for (std::int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i)
    {
        if (std::strcmp(fields->fields[i].name, "directions") == 0)
        {
            return static_cast<char const*>(fields->fields[i].data);
        }
    }
    return "";
}

// Checks without a device -------------------------------------------------------------------------------------------------

void check_creator(IPluginCreatorV3One& creator)
{
    check(std::strcmp(creator.getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "the creator is of kind V3ONE");
    check(std::strcmp(creator.getPluginName(), "SelectiveScan2D") == 0, "the creator's name");
    check(std::strcmp(creator.getPluginVersion(), "1") == 0, "the creator's version");
    check(std::strcmp(creator.getPluginNamespace(), "quartermap") == 0, "the creator's namespace");
    PluginFieldCollection const* names = creator.getFieldNames();
    check(names != nullptr && names->nbFields == 2 && std::strcmp(names->fields[0].name, "directions") == 0
            && std::strcmp(names->fields[1].name, "softplus") == 0,
        "the creator names its fields");
}

void check_fields(IPluginCreatorV3One& creator)
{
    std::printf("fields that have to be refused, each with its reason:\n");
    std::int32_t const number = 1;
    std::int64_t const wide = 1;
    std::int64_t const two = 2;
    float const fraction = 1.0F;
    auto const refused = [&](FieldList const& list, std::string const& what) {
        check(Capabilities(list.create(creator)).plugin == nullptr, "refuses " + what);
    };
    refused(FieldList(), "no fields");
    check(creator.createPlugin("scan", nullptr, TensorRTPhase::kBUILD) == nullptr, "refuses a null collection");
    refused(FieldList().directions(kAll), "a missing softplus");
    refused(FieldList().softplus(1), "missing directions");
    refused(FieldList().directions(kAll).softplus(1).add("unknown", &number, PluginFieldType::kINT32, 1),
        "an unknown field");
    refused(FieldList().directions("row,diagonal").softplus(1), "an unknown direction");
    refused(FieldList().directions("row,col").softplus(1), "the beginning of a direction's name");
    refused(FieldList().directions("rows").softplus(1), "more than a direction's name");
    refused(FieldList().directions("").softplus(1), "empty directions");
    refused(FieldList().directions(",,").softplus(1), "directions without a name");
    refused(FieldList().directions("row,row,row,row,row,row,row,row,row").softplus(1), "nine directions");
    refused(FieldList().directions("row").softplus(2), "a softplus of 2");
    refused(FieldList().directions("row").add("softplus", &two, PluginFieldType::kINT64, 1), "a wide softplus of 2");
    refused(FieldList().directions("row").add("softplus", &fraction, PluginFieldType::kFLOAT32, 1),
        "a softplus of another type");
    refused(FieldList().directions("row").add("softplus", nullptr, PluginFieldType::kINT32, 1), "a null softplus");
    refused(FieldList().softplus(1).add("directions", &number, PluginFieldType::kINT32, 1),
        "directions of another type");

    auto const accepted = [&](FieldList const& list, std::string const& expected, std::string const& what) {
        Capabilities const plugin(list.create(creator));
        check(plugin.plugin != nullptr && serialized_directions(plugin) == expected, "takes " + what);
    };
    std::string const all = "row,column,row_reverse,column_reverse";
    accepted(FieldList().directions(kAll).softplus(1), all, "directions as the parser passes them");
    accepted(FieldList().directions(all).softplus(0), all, "directions with commas");
    accepted(FieldList().directions("column_reverse").softplus(1), "column_reverse", "one direction");
    accepted(FieldList().directions("row,row,row,row,row,row,row,row").softplus(1), "row,row,row,row,row,row,row,row",
        "eight directions");
    accepted(FieldList().directions(kAll).add("softplus", &wide, PluginFieldType::kINT64, 1), all, "a wide softplus");
}

DynamicPluginTensorDesc describe(std::vector<std::int64_t> const& shape, DataType type,
    TensorFormat format = TensorFormat::kLINEAR, std::int64_t batch = -2)
{
    DynamicPluginTensorDesc result{};
    result.desc.dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), result.desc.dims.d);
    result.desc.type = type;
    result.desc.format = format;
    result.desc.scale = 1.0F;
    result.min = result.max = result.opt = result.desc.dims;
    if (batch >= 0 && shape.size() == 4) // a dynamic batch with this maximum
    {
        result.desc.dims.d[0] = -1;
        result.min.d[0] = 1;
        result.max.d[0] = result.opt.d[0] = batch;
    }
    return result;
}

struct Sizes
{
    std::int64_t batch, d_inner, height, width, d_state, dt_rank, directions;
};

std::vector<std::vector<std::int64_t>> shapes_of(Sizes const& s)
{
    std::int64_t const k = s.directions;
    std::vector<std::vector<std::int64_t>> shapes = {
        {s.batch, s.d_inner, s.height, s.width},
        {s.batch, k * (s.dt_rank > 0 ? s.dt_rank : s.d_inner), s.height, s.width},
        {s.batch, k * s.d_state, s.height, s.width},
        {s.batch, k * s.d_state, s.height, s.width},
        {k * s.d_inner, s.d_state},
        {k * s.d_inner},
        {k * s.d_inner},
    };
    if (s.dt_rank > 0)
    {
        shapes.push_back({k * s.d_inner, s.dt_rank});
    }
    return shapes;
}

bool is_parameter(std::size_t input)
{
    return input >= 4 && input <= 6;
}

void check_shapes(IPluginCreatorV3One& creator)
{
    Capabilities plugin(FieldList().directions(kAll).softplus(1).create(creator));
    // Sizes that may be computed from others. The plugin hands them on without looking into them, so any address will do.
    std::vector<char> expressions;
    expressions.reserve(64);
    auto const made = [&expressions] {
        expressions.push_back(0);
        return reinterpret_cast<IDimensionExpr const*>(&expressions.back());
    };
    char nothing = 0;
    auto& builder = reinterpret_cast<IExprBuilder&>(nothing);
    for (std::int64_t const rank : {std::int64_t{0}, std::int64_t{6}})
    {
        auto const shapes = shapes_of({-1, 96, -1, 14, 1, rank, 4});
        std::vector<DimsExprs> inputs;
        for (auto const& shape : shapes)
        {
            DimsExprs dims{};
            dims.nbDims = static_cast<std::int32_t>(shape.size());
            for (std::size_t i = 0; i < shape.size(); ++i)
            {
                dims.d[i] = made();
            }
            inputs.push_back(dims);
        }
        auto const count = static_cast<std::int32_t>(inputs.size());
        DimsExprs output{};
        check(plugin.build->getOutputShapes(inputs.data(), count, nullptr, 0, &output, 1, builder) == 0
                && output.nbDims == 4 && std::equal(output.d, output.d + 4, inputs[0].d),
            "the output has the shape of x, dynamic sizes included");
        std::vector<DataType> types(inputs.size(), DataType::kHALF);
        DataType type{};
        check(plugin.build->getOutputDataTypes(&type, 1, types.data(), count) == 0 && type == DataType::kHALF,
            "the output has the type of x");
    }
    DimsExprs none{};
    DimsExprs output{};
    std::printf("shapes that have to be refused, each with its reason:\n");
    check(plugin.build->getOutputShapes(&none, 1, nullptr, 0, &output, 1, builder) != 0, "refuses a single input");

    auto const configured = [&](Sizes const& sizes, std::vector<std::vector<std::int64_t>> const& shapes) {
        std::vector<DynamicPluginTensorDesc> descs;
        for (std::size_t i = 0; i < shapes.size(); ++i)
        {
            descs.push_back(describe(shapes[i], is_parameter(i) ? DataType::kFLOAT : DataType::kHALF));
        }
        DynamicPluginTensorDesc const out
            = describe({sizes.batch, sizes.d_inner, sizes.height, sizes.width}, DataType::kHALF);
        return plugin.build->configurePlugin(descs.data(), static_cast<std::int32_t>(descs.size()), &out, 1) == 0;
    };
    Sizes const sizes{2, 10, 7, 5, 3, 4, 4};
    check(configured(sizes, shapes_of(sizes)), "configures with fitting shapes");
    check(configured(sizes, shapes_of({-1, 10, -1, -1, 3, 4, 4})), "configures with dynamic shapes");
    auto empty = shapes_of(sizes);
    empty[quartermap::kDt][1] = empty[quartermap::kDtWeight][1] = 0;
    check(!configured(sizes, empty), "refuses a dt_weight without columns");
    auto const shapes = shapes_of(sizes);
    for (std::size_t i = 0; i < shapes.size(); ++i)
    {
        for (std::size_t axis = 0; axis < shapes[i].size(); ++axis)
        {
            // A rank that dt_weight has is what dt must have, and N comes from A, so that one of the pair differs.
            auto wrong = shapes;
            wrong[i][axis] += 1;
            check(!configured(sizes, wrong),
                "refuses axis " + std::to_string(axis) + " of " + quartermap::kInputs[i].name);
        }
    }
}

void check_formats(IPluginCreatorV3One& creator)
{
    Capabilities plugin(FieldList().directions(kAll).softplus(1).create(creator));
    std::vector<DataType> const types = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8,
        DataType::kINT32, DataType::kBOOL, DataType::kINT64};
    std::vector<TensorFormat> const formats = {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8,
        TensorFormat::kCHW4, TensorFormat::kCHW16, TensorFormat::kCHW32, TensorFormat::kHWC};
    for (std::int64_t const rank : {std::int64_t{0}, std::int64_t{6}})
    {
        auto shapes = shapes_of({2, 8, 7, 7, 1, rank, 4});
        auto const inputs = static_cast<std::int32_t>(shapes.size());
        shapes.push_back(shapes[0]);
        for (DataType const x : types)
        {
            bool const known = x == DataType::kFLOAT || x == DataType::kHALF || x == DataType::kBF16;
            for (std::int32_t pos = 0; pos <= inputs; ++pos)
            {
                for (DataType const type : types)
                {
                    for (TensorFormat const format : formats)
                    {
                        // TensorRT asks in order, so what lies before `pos` is right already.
                        std::vector<DynamicPluginTensorDesc> descs;
                        for (std::int32_t i = 0; i <= inputs; ++i)
                        {
                            auto const at = static_cast<std::size_t>(i);
                            descs.push_back(describe(shapes[at], is_parameter(at) ? DataType::kFLOAT : x));
                        }
                        auto const at = static_cast<std::size_t>(pos);
                        descs[at] = describe(shapes[at], type, format);
                        bool const as_x = !is_parameter(at);
                        bool const fits = pos == 0 ? type == DataType::kFLOAT || type == DataType::kHALF
                                    || type == DataType::kBF16
                            : as_x ? type == x
                                   : type == DataType::kFLOAT;
                        bool const expected = fits && format == TensorFormat::kLINEAR;
                        if (pos == 0 || known)
                        {
                            check(plugin.build->supportsFormatCombination(pos, descs.data(), inputs, 1) == expected,
                                "format combination of input " + std::to_string(pos));
                        }
                    }
                }
            }
        }
    }
    check(!plugin.build->supportsFormatCombination(0, nullptr, 3, 1), "no format for three inputs");
}

void check_workspace(IPluginCreatorV3One& creator)
{
    Capabilities plugin(FieldList().directions(kAll).softplus(1).create(creator));
    auto const workspace = [&](Sizes const& sizes, DataType type) {
        auto const shapes = shapes_of(sizes);
        std::vector<DynamicPluginTensorDesc> descs;
        for (std::size_t i = 0; i < shapes.size(); ++i)
        {
            DataType const own = is_parameter(i) ? DataType::kFLOAT : type;
            descs.push_back(describe(shapes[i], own, TensorFormat::kLINEAR, sizes.batch));
        }
        DynamicPluginTensorDesc const out = descs[0];
        return plugin.build->getWorkspaceSize(descs.data(), static_cast<std::int32_t>(descs.size()), &out, 1);
    };
    check(workspace({8, 95, 56, 56, 1, 6, 4}, DataType::kHALF) == 0, "maps of 56 x 56 need no workspace");
    check(workspace({8, 96, 56, 56, 1, 6, 4}, DataType::kHALF) >= std::size_t{4} * 8 * 96 * 56 * 56 * 2,
        "the kernels on tensor cores have room for what each direction gives");
    check(workspace({8, 96, 200, 200, 1, 6, 4}, DataType::kFLOAT) == 0, "float32 never needs a workspace");
    check(workspace({8, 96, 200, 200, 1, 6, 4}, DataType::kHALF) == std::size_t{8} * 96 * 200 * 200 * 4,
        "large maps have a float32 workspace, for the largest batch");
}

void check_descriptions(IPluginCreatorV3One& creator)
{
    auto const described = [&](std::string const& directions, std::int32_t softplus) {
        Capabilities plugin(FieldList().directions(directions).softplus(softplus).create(creator));
        char const* const timing = plugin.build->getTimingCacheID();
        char const* const metadata = plugin.build->getMetadataString();
        check(timing != nullptr && metadata != nullptr, "describes itself");
        return std::make_pair(std::string(timing), std::string(metadata));
    };
    auto const one = described(kAll, 1);
    check(one == described("row,column,row_reverse,column_reverse", 1), "the same fields have the same timing ID");
    // What was measured with one set of fields says nothing about another, nor about other kernels.
    check(one.first != described("row,column", 1).first, "other directions have another timing ID");
    check(one.first != described(kAll, 0).first, "another softplus has another timing ID");
    std::string const version = "kernels=" + std::to_string(QUARTERMAP_SELECTIVE_SCAN_VERSION);
    check(one.first.find(version) != std::string::npos, "the timing ID names the kernels' version");
    check(one.second.find("directions=row,column,row_reverse,column_reverse;") != std::string::npos
            && one.second.find("softplus=1;") != std::string::npos,
        "the metadata names the fields");
    std::string const longest = "column_reverse,column_reverse,column_reverse,column_reverse,column_reverse,"
                                "column_reverse,column_reverse,column_reverse";
    check(described(longest, 1).first.find(longest + ";softplus=1;" + version) != std::string::npos,
        "the longest description is whole");
}

void check_life(IPluginCreatorV3One& creator)
{
    Capabilities plugin(FieldList().directions("column,row_reverse").softplus(0).create(creator));
    check(plugin.core != nullptr && plugin.build != nullptr && plugin.runtime != nullptr, "has three capabilities");
    check(std::strcmp(plugin.core->getPluginName(), creator.getPluginName()) == 0
            && std::strcmp(plugin.core->getPluginVersion(), creator.getPluginVersion()) == 0
            && std::strcmp(plugin.core->getPluginNamespace(), creator.getPluginNamespace()) == 0,
        "the plugin is named as its creator");
    check(plugin.build->getNbOutputs() == 1, "has one output");
    check(plugin.build->getNbTactics() == 0, "has no tactics of its own");

    Capabilities copy(plugin.plugin->clone());
    plugin.plugin.reset();
    check(copy.plugin != nullptr && serialized_directions(copy) == "column,row_reverse", "a clone outlives its origin");

    // Serialise and make again, as when an engine is loaded.
    PluginFieldCollection const* fields = copy.runtime->getFieldsToSerialize();
    Capabilities again(creator.createPlugin("scan", fields, TensorRTPhase::kRUNTIME));
    check(again.plugin != nullptr && serialized_directions(again) == "column,row_reverse", "is made again");
    PluginFieldCollection const* second = again.plugin == nullptr ? nullptr : again.runtime->getFieldsToSerialize();
    bool same = second != nullptr && second->nbFields == fields->nbFields;
    for (std::int32_t i = 0; same && i < fields->nbFields; ++i)
    {
        PluginField const& a = fields->fields[i];
        PluginField const& b = second->fields[i];
        std::size_t const width = a.type == PluginFieldType::kCHAR ? 1 : 4;
        same = std::strcmp(a.name, b.name) == 0 && a.type == b.type && a.length == b.length
            && std::memcmp(a.data, b.data, width * static_cast<std::size_t>(a.length)) == 0;
    }
    check(same, "what was made again serialises to the same bytes");
    std::unique_ptr<IPluginV3> attached(again.runtime->attachToContext(nullptr));
    check(attached != nullptr, "attaches to a context");
}

// Golden cases ------------------------------------------------------------------------------------------------------------

// Memory that the kernel can reach: the device's, or with emulated kernels the host's.
class Memory
{
public:
    explicit Memory(std::size_t bytes)
        : bytes_(std::max<std::size_t>(bytes, 1))
    {
#if defined(QUARTERMAP_EMULATION)
        data_ = std::malloc(bytes_);
        std::memset(data_, 0xff, bytes_);
#else
        fine_ = cudaMalloc(&data_, bytes_) == cudaSuccess && cudaMemset(data_, 0xff, bytes_) == cudaSuccess;
#endif
    }
    Memory(Memory&& other) noexcept
        : bytes_(other.bytes_)
        , data_(other.data_)
        , fine_(other.fine_)
    {
        other.data_ = nullptr;
    }
    Memory(Memory const&) = delete;
    ~Memory()
    {
#if defined(QUARTERMAP_EMULATION)
        std::free(data_);
#else
        cudaFree(data_);
#endif
    }

    void* get() const
    {
        return data_;
    }
    bool write(void const* from, std::size_t bytes)
    {
#if defined(QUARTERMAP_EMULATION)
        std::memcpy(data_, from, bytes);
        return true;
#else
        return fine_ && cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess;
#endif
    }
    bool read(void* to, std::size_t bytes) const
    {
#if defined(QUARTERMAP_EMULATION)
        std::memcpy(to, data_, bytes);
        return true;
#else
        return fine_ && cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost) == cudaSuccess;
#endif
    }

private:
    std::size_t bytes_;
    void* data_ = nullptr;
    bool fine_ = true;
};

bool device_present()
{
#if defined(QUARTERMAP_EMULATION)
    return true;
#else
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
#endif
}

bool synchronise()
{
#if defined(QUARTERMAP_EMULATION)
    return true;
#else
    return cudaDeviceSynchronize() == cudaSuccess;
#endif
}

// One case of write_golden.py: a line of text, then the tensors as they lie in memory, then y in float64.
//   NAME type softplus tolerance batch d_inner H W N R K direction...
struct Case
{
    std::string name;
    std::string type;
    int softplus = 0;
    double tolerance = 0;
    Sizes sizes{};
    std::string directions;
    std::vector<std::vector<char>> inputs;
    std::vector<double> expected;
};

std::size_t volume(std::vector<std::int64_t> const& shape)
{
    std::size_t product = 1;
    for (std::int64_t const size : shape)
    {
        product *= static_cast<std::size_t>(size);
    }
    return product;
}

std::size_t width_of(std::string const& type)
{
    return type == "float32" ? 4 : 2;
}

bool read_case(std::string const& path, Case& result)
{
    std::ifstream file(path, std::ios::binary);
    file >> result.name >> result.type >> result.softplus >> result.tolerance >> result.sizes.batch
        >> result.sizes.d_inner >> result.sizes.height >> result.sizes.width >> result.sizes.d_state
        >> result.sizes.dt_rank >> result.sizes.directions >> result.directions;
    file.get();
    auto const shapes = shapes_of(result.sizes);
    for (std::size_t i = 0; file && i < shapes.size(); ++i)
    {
        std::vector<char> bytes(volume(shapes[i]) * (is_parameter(i) ? 4 : width_of(result.type)));
        file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        result.inputs.push_back(std::move(bytes));
    }
    result.expected.resize(volume(shapes[0]));
    file.read(reinterpret_cast<char*>(result.expected.data()),
        static_cast<std::streamsize>(result.expected.size() * sizeof(double)));
    return static_cast<bool>(file);
}

double value_of(std::vector<char> const& bytes, std::size_t i, std::string const& type)
{
    if (type == "float32")
    {
        float value;
        std::memcpy(&value, bytes.data() + i * 4, 4);
        return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + i * 2, 2);
    if (type == "bfloat16")
    {
        std::uint32_t const wide = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    int const exponent = (bits >> 10) & 31;
    double const fraction = (bits & 1023) / 1024.0;
    double const magnitude = exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
        : exponent == 0                     ? std::ldexp(fraction, -14)
                                            : std::ldexp(1 + fraction, exponent - 15);
    return bits & 0x8000 ? -magnitude : magnitude;
}

// A golden case with its tensors where the kernel can reach them.
class Scene
{
public:
    explicit Scene(Case const& golden)
        : golden_(golden)
        , type_(golden.type == "float32" ? DataType::kFLOAT
                  : golden.type == "float16" ? DataType::kHALF
                                             : DataType::kBF16)
        , y_(golden.expected.size() * width_of(golden.type))
    {
        auto const shapes = shapes_of(golden.sizes);
        for (std::size_t i = 0; i < shapes.size(); ++i)
        {
            descs_.push_back(describe(shapes[i], is_parameter(i) ? DataType::kFLOAT : type_));
            plain_.push_back(descs_.back().desc);
            memory_.emplace_back(golden.inputs[i].size());
            fine_ = memory_.back().write(golden.inputs[i].data(), golden.inputs[i].size()) && fine_;
            inputs_.push_back(memory_.back().get());
        }
    }

    // As the builder does; the plugin then says how much workspace it wants.
    bool configure(Capabilities const& plugin)
    {
        DynamicPluginTensorDesc const out = descs_[0];
        bool const fine = plugin.build->configurePlugin(descs_.data(), count(), &out, 1) == 0;
        workspace_ = std::make_unique<Memory>(plugin.build->getWorkspaceSize(descs_.data(), count(), &out, 1));
        return fine && fine_;
    }

    bool tell(Capabilities const& plugin) const
    {
        return plugin.runtime->onShapeChange(plain_.data(), count(), &plain_[0], 1) == 0;
    }

    bool enqueue(Capabilities const& plugin)
    {
        void* const outputs[] = {y_.get()};
        return plugin.runtime->enqueue(
                   plain_.data(), &plain_[0], inputs_.data(), outputs, workspace_->get(), nullptr)
            == 0;
    }

    // Runs what onShapeChange was told of, and compares. Returns the error as a share of the largest value; infinite if
    // the run failed.
    double run(Capabilities const& plugin)
    {
        std::size_t const elements = golden_.expected.size();
        std::vector<char> result(elements * width_of(golden_.type), '\xff');
        // Nothing of an earlier run may be left.
        bool const fine = fine_ && y_.write(result.data(), result.size()) && enqueue(plugin) && synchronise()
            && y_.read(result.data(), result.size());
        double worst = fine ? 0 : INFINITY;
        double largest = 0;
        for (std::size_t i = 0; i < elements && fine; ++i)
        {
            double const error = std::fabs(value_of(result, i, golden_.type) - golden_.expected[i]);
            worst = error <= worst ? worst : error; // NaN stays
            largest = std::max(largest, std::fabs(golden_.expected[i]));
        }
        return fine ? worst / largest : worst;
    }

    bool close(Capabilities const& plugin)
    {
        return run(plugin) <= golden_.tolerance;
    }

    Case const& golden() const
    {
        return golden_;
    }

private:
    std::int32_t count() const
    {
        return static_cast<std::int32_t>(plain_.size());
    }

    Case const& golden_;
    DataType type_;
    Memory y_;
    std::unique_ptr<Memory> workspace_;
    std::vector<DynamicPluginTensorDesc> descs_;
    std::vector<PluginTensorDesc> plain_;
    std::vector<Memory> memory_;
    std::vector<void const*> inputs_;
    bool fine_ = true;
};

Capabilities make(IPluginCreatorV3One& creator, Case const& golden)
{
    return Capabilities(
        std::move(FieldList().directions(golden.directions).softplus(golden.softplus)).create(creator));
}

// The plugin of an execution context: made from what was serialised.
Capabilities in_context(IPluginCreatorV3One& creator, Capabilities const& built)
{
    Capabilities const loaded(
        creator.createPlugin("scan", built.runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    return Capabilities(loaded.runtime->attachToContext(nullptr));
}

void run_case(IPluginCreatorV3One& creator, Case const& golden, std::map<std::string, Capabilities>& shared)
{
    Capabilities const built = make(creator, golden);
    if (built.plugin == nullptr)
    {
        check(false, golden.name + ": is created");
        return;
    }
    std::string const name = golden.name + " " + golden.type;
    Scene scene(golden);
    check(scene.configure(built), name + ": is configured");
    Capabilities const context = in_context(creator, built);
    check(scene.tell(context), name + ": is told of the shape");
    double const error = scene.run(context);
    bool const close = error <= golden.tolerance;
    std::printf("%-44s %-9s error %.2e of the largest value, tolerance %.0e%s\n", golden.name.c_str(),
        golden.type.c_str(), error, golden.tolerance, close ? "" : "   FAILED");
    check(close, name);
    unsigned const before = preparations == nullptr ? 0 : preparations();
    check(scene.tell(context) && scene.close(context), name + ": told of the same shape, and run again");
    Capabilities const copy(context.plugin->clone());
    check(scene.close(copy), name + ": a clone knows the shape");
    check(preparations == nullptr || preparations() == before, name + ": nothing is prepared twice, nor by a run");

    // One context for all cases with these fields: one shape after the other, with eight inputs or seven.
    std::string const fields = golden.directions + std::to_string(golden.softplus);
    auto const found = shared.find(fields);
    Capabilities const& other = found != shared.end() ? found->second
                                                      : shared.emplace(fields, in_context(creator, built)).first->second;
    if (found != shared.end())
    {
        check(!scene.enqueue(other), name + ": does not run before the context was told of the shape");
    }
    check(scene.tell(other) && scene.close(other), name + ": after another shape");
}

// What has to be refused with an error, and must not crash.
void check_refusals(IPluginCreatorV3One& creator)
{
    std::printf("runs that have to be refused, each with its reason:\n");
    Capabilities const plugin(FieldList().directions(kAll).softplus(1).create(creator));
    // Maps that no device holds in shared memory, so that float16 needs a workspace.
    auto const shapes = shapes_of({1, 2, 400, 400, 1, 2, 4});
    std::vector<PluginTensorDesc> descs;
    for (std::size_t i = 0; i < shapes.size(); ++i)
    {
        descs.push_back(describe(shapes[i], is_parameter(i) ? DataType::kFLOAT : DataType::kHALF).desc);
    }
    auto const count = static_cast<std::int32_t>(descs.size());
    Memory memory(16); // not reached
    std::vector<void const*> inputs(shapes.size(), memory.get());
    void* outputs[] = {memory.get()};
    auto const runs = [&](void* workspace) {
        return plugin.runtime->enqueue(descs.data(), &descs[0], inputs.data(), outputs, workspace, nullptr) == 0;
    };
    check(!runs(memory.get()), "refuses to run before it was told of a shape");
    check(plugin.runtime->onShapeChange(descs.data(), count, &descs[0], 1) == 0, "takes a large map");
    check(!runs(nullptr), "refuses a missing workspace");
    for (void const*& input : inputs)
    {
        void const* const kept = input;
        input = nullptr;
        check(!runs(memory.get()), "refuses a missing input");
        input = kept;
    }
    outputs[0] = nullptr;
    check(!runs(memory.get()), "refuses a missing output");
    outputs[0] = memory.get();
    descs[quartermap::kDt].dims.d[1] += 1;
    check(plugin.runtime->onShapeChange(descs.data(), count, &descs[0], 1) != 0, "refuses shapes that do not fit");
    check(!runs(memory.get()), "refuses to run after that");
}

// Without a GPU a plugin can be made, for engines that are built elsewhere, but not run.
void check_without_device(IPluginCreatorV3One& creator)
{
    Capabilities const plugin(FieldList().directions(kAll).softplus(1).create(creator));
    std::vector<PluginTensorDesc> descs;
    for (auto const& shape : shapes_of({1, 2, 7, 7, 1, 0, 4}))
    {
        descs.push_back(describe(shape, DataType::kFLOAT).desc);
    }
    auto const count = static_cast<std::int32_t>(descs.size());
    std::printf("a shape that has to be refused for want of a GPU:\n");
    check(plugin.runtime->onShapeChange(descs.data(), count, &descs[0], 1) != 0, "refuses to run without a GPU");
}

// A launch that fails must not be laid at the door of the next one.
void check_recovery(void* library, IPluginCreatorV3One& creator, Case const& golden)
{
    auto const plan_scan
        = reinterpret_cast<decltype(&quartermap_selective_scan_plan)>(dlsym(library, "quartermap_selective_scan_plan"));
    auto const prepare = reinterpret_cast<decltype(&quartermap_selective_scan_prepare)>(
        dlsym(library, "quartermap_selective_scan_prepare"));
    auto const launch = reinterpret_cast<decltype(&quartermap_selective_scan_launch)>(
        dlsym(library, "quartermap_selective_scan_launch"));
    check(plan_scan != nullptr && prepare != nullptr && launch != nullptr, "the C interface is exported");

    Capabilities const plugin = make(creator, golden);
    Scene scene(golden);
    check(scene.configure(plugin) && scene.tell(plugin), "is ready");
    QuartermapScan scan{};
    scan.batch = scan.d_inner = scan.height = scan.width = scan.d_state = scan.direction_count = 1;
    QuartermapScanPlan plan{};
    check(plan_scan(&scan, &plan) == QUARTERMAP_SUCCESS && prepare(&plan) == QUARTERMAP_SUCCESS, "plans a scan");
    std::fill(std::begin(plan.layout), std::end(plan.layout), 0); // no blocks
    Memory memory(64);
    auto* const data = static_cast<float*>(memory.get());
    QuartermapScanTensors const tensors{data, data, data, data, data, data, data, nullptr, data, nullptr, 0};
    check(launch(&plan, &tensors, nullptr) > QUARTERMAP_CUDA_ERROR, "a launch without blocks fails");
    check(scene.close(plugin), "the launch after it does not");
}

// Two contexts in two threads, whose kernels ask for different amounts of shared memory.
void check_threads(IPluginCreatorV3One& creator, std::vector<Case> const& cases)
{
    constexpr std::size_t kThreads = 2;
    bool fine[kThreads] = {true, true};
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < kThreads; ++t)
    {
        threads.emplace_back([&, t] {
            for (std::size_t i = t; i < cases.size(); i += kThreads)
            {
                Capabilities const plugin = make(creator, cases[i]);
                Scene scene(cases[i]);
                fine[t] = fine[t] && scene.configure(plugin) && scene.tell(plugin) && scene.close(plugin);
            }
        });
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    check(fine[0] && fine[1], "two contexts run in two threads");
}

void run_cases(void* library, IPluginCreatorV3One& creator, std::string const& folder)
{
    std::vector<Case> cases;
    std::ifstream index(folder + "/index.txt");
    for (std::string name; std::getline(index, name);)
    {
        Case golden;
        bool const readable = read_case(folder + "/" + name, golden);
        check(readable, "reads " + name);
        if (readable)
        {
            cases.push_back(std::move(golden));
        }
    }
    check(!cases.empty(), "there are golden cases");
    std::map<std::string, Capabilities> shared;
    for (Case const& golden : cases)
    {
        run_case(creator, golden, shared);
    }
    check_refusals(creator);
    if (!cases.empty())
    {
        check_recovery(library, creator, cases.front());
    }
    check_threads(creator, cases);
}

// How the creator is come by: from the library itself, or from the registry of a real TensorRT that loads it.
struct Source
{
    quartermap::Registry registry;
    quartermap::LibraryHandle handle = nullptr;
    void* library = nullptr; // for the C interface
    IPluginCreatorV3One* creator = nullptr;
};

Source from_library(char const* path)
{
    Source source;
    source.library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (source.library == nullptr)
    {
        std::fprintf(stderr, "cannot load the plugin: %s\n", dlerror());
        return source;
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
    auto const get_creators = reinterpret_cast<GetCreators>(dlsym(source.library, "getCreators"));
    auto const set_finder = reinterpret_cast<void (*)(void*)>(dlsym(source.library, "setLoggerFinder"));
    check(get_creators != nullptr && set_finder != nullptr, "getCreators and setLoggerFinder are exported");
    if (get_creators != nullptr && set_finder != nullptr)
    {
        set_finder(nullptr);
        std::int32_t count = 0;
        IPluginCreatorInterface* const* creators = get_creators(count);
        check(count == 1, "there is one creator");
        source.creator = static_cast<IPluginCreatorV3One*>(creators[0]);
    }
    return source;
}

int count_listed(quartermap::Registry const& registry)
{
    std::int32_t count = 0;
    IPluginCreatorInterface* const* all = registry.all_creators(&count);
    return static_cast<int>(std::count_if(all, all + count, [](IPluginCreatorInterface* each) {
        return std::strcmp(each->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0
            && std::strcmp(static_cast<IPluginCreatorV3One*>(each)->getPluginNamespace(), kPluginNamespace) == 0;
    }));
}

// What the registry knows under our name.
IPluginCreatorInterface* looked_up(quartermap::Registry const& registry)
{
    return registry.creator(quartermap::kPluginName, quartermap::kPluginVersion, kPluginNamespace);
}

Source from_registry(char const* tensorrt, char const* path)
{
    Source source;
    void* const real = dlopen(tensorrt, RTLD_NOW | RTLD_LOCAL);
    auto const version = real == nullptr ? nullptr
                                         : reinterpret_cast<std::int32_t (*)()>(dlsym(real, "getInferLibVersion"));
    auto const get = real == nullptr ? nullptr : reinterpret_cast<void* (*)()>(dlsym(real, "getPluginRegistry"));
    if (version == nullptr || get == nullptr || quartermap::order_of(version()) == quartermap::Order::kUNKNOWN)
    {
        std::fprintf(stderr, "no TensorRT that is known: %s\n", tensorrt);
        return source;
    }
    std::printf("the registry of TensorRT %d\n", static_cast<int>(version()));
    source.registry = quartermap::Registry(get(), quartermap::order_of(version()));
    check(looked_up(source.registry) == nullptr, "the registry does not know the creator before");
    check(source.registry.load_library("/nowhere/libquartermap_plugin.so") == nullptr, "refuses a file that is missing");
    for (int round = 0; round < 2; ++round)
    {
        source.handle = source.registry.load_library(path);
        check(source.handle != nullptr && count_listed(source.registry) == 1, "loads the library and lists its creator");
        if (source.handle == nullptr)
        {
            return source;
        }
        if (round == 0)
        {
            source.registry.deregister_library(source.handle);
            check(looked_up(source.registry) == nullptr && count_listed(source.registry) == 0, "lets go of it");
        }
    }
    source.library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    check(source.library != nullptr && count_listed(source.registry) == 1, "opening it once more changes nothing");
    IPluginCreatorInterface* const found = looked_up(source.registry);
    bool const ours = found != nullptr && std::strcmp(found->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0;
    check(ours, "the registry hands out the creator by its name, version and namespace");
    source.creator = ours ? static_cast<IPluginCreatorV3One*>(found) : nullptr;
    return source;
}

void let_go(Source const& source)
{
    if (source.registry && source.handle != nullptr)
    {
        source.registry.deregister_library(source.handle);
        check(looked_up(source.registry) == nullptr, "lets go of the library at the end");
    }
}

} // namespace

int main(int argc, char** argv)
{
    bool const real = argc > 2 && std::strcmp(argv[1], "--registry") == 0;
    int const first = real ? 3 : 1;
    if (argc <= first || argc > first + 2)
    {
        std::fprintf(stderr, "usage: %s [--registry TENSORRT] LIBRARY [GOLDEN_FOLDER]\n", argv[0]);
        return 2;
    }
    Source const source = real ? from_registry(argv[2], argv[first]) : from_library(argv[first]);
    if (source.creator == nullptr || source.library == nullptr)
    {
        return 1;
    }
    preparations
        = reinterpret_cast<unsigned (*)()>(dlsym(source.library, "quartermap_emulation_preparations"));
    IPluginCreatorV3One& creator = *source.creator;
    check_creator(creator);
    check_fields(creator);
    check_shapes(creator);
    check_formats(creator);
    check_workspace(creator);
    check_descriptions(creator);
    check_life(creator);

    char const* skipped = nullptr;
    if (argc < first + 2)
    {
        skipped = "no golden folder was named";
    }
    else if (!device_present())
    {
        skipped = "there is no GPU";
        check_without_device(creator);
    }
    else
    {
        run_cases(source.library, creator, argv[first + 1]);
    }
    let_go(source);
    std::printf("%d checks, %d failed\n", checks, failures);
    if (skipped != nullptr)
    {
        std::printf("SKIPPED: the kernel was not run, as %s\n", skipped);
    }
    return failures > 0 ? 1 : skipped != nullptr ? 77 : 0;
}
