#include "plugin_checks.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capabilities.h"
#include "checks.h"
#include "contract.h"
#include "fields.h"
#include "quartermap/selective_scan.h"
#include "shapes.h"

namespace quartermap::host
{

using namespace nvinfer1;

namespace
{

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

} // namespace

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

} // namespace quartermap::host
