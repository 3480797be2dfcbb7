// The fields that a plugin is made from.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "interface.h"

namespace quartermap::host
{

struct FieldList
{
    std::vector<nvinfer1::PluginField> fields;

    FieldList& directions(std::string const& names)
    {
        texts.push_back(std::make_unique<std::string>(names));
        fields.emplace_back("directions", texts.back()->data(), nvinfer1::PluginFieldType::kCHAR,
            static_cast<std::int32_t>(texts.back()->size()));
        return *this;
    }
    FieldList& softplus(std::int32_t value)
    {
        numbers.push_back(std::make_unique<std::int32_t>(value));
        fields.emplace_back("softplus", numbers.back().get(), nvinfer1::PluginFieldType::kINT32, 1);
        return *this;
    }
    FieldList& add(char const* name, void const* data, nvinfer1::PluginFieldType type, std::int32_t length)
    {
        fields.emplace_back(name, data, type, length);
        return *this;
    }
    nvinfer1::PluginFieldCollection collection() const
    {
        nvinfer1::PluginFieldCollection result;
        result.nbFields = static_cast<std::int32_t>(fields.size());
        result.fields = fields.data();
        return result;
    }
    nvinfer1::IPluginV3* create(nvinfer1::IPluginCreatorV3One& creator) const
    {
        nvinfer1::PluginFieldCollection const made = collection();
        return creator.createPlugin("scan", &made, nvinfer1::TensorRTPhase::kBUILD);
    }

    std::vector<std::unique_ptr<std::string>> texts;
    std::vector<std::unique_ptr<std::int32_t>> numbers;
};

// As TensorRT's ONNX parser passes an attribute of type STRINGS: each name with a NUL behind it.
inline std::string const kAll
    = std::string("row") + '\0' + "column" + '\0' + "row_reverse" + '\0' + "column_reverse" + '\0';

} // namespace quartermap::host
