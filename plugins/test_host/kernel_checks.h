// Runs of the kernel through the plugin: golden cases, and what has to be refused.
#pragma once

#include <string>

#include "interface.h"

namespace quartermap::host
{

// Without a GPU a plugin can be made, for engines that are built elsewhere, but not run.
void check_without_device(nvinfer1::IPluginCreatorV3One& creator);

// Runs the cases of a golden folder: each by itself, in contexts that it shares with others, and in two threads.
void run_cases(void* library, nvinfer1::IPluginCreatorV3One& creator, std::string const& folder);

} // namespace quartermap::host
