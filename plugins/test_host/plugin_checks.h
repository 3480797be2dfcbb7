// What a plugin and its creator answer without a device: names, fields, shapes, formats, workspace, descriptions, copies.
#pragma once

#include "interface.h"

namespace quartermap::host
{

void check_creator(nvinfer1::IPluginCreatorV3One& creator);
void check_fields(nvinfer1::IPluginCreatorV3One& creator);
void check_shapes(nvinfer1::IPluginCreatorV3One& creator);
void check_formats(nvinfer1::IPluginCreatorV3One& creator);
void check_workspace(nvinfer1::IPluginCreatorV3One& creator);
void check_descriptions(nvinfer1::IPluginCreatorV3One& creator);
void check_life(nvinfer1::IPluginCreatorV3One& creator);

} // namespace quartermap::host
