// How the creator is come by: from the library itself, or from the registry of a real TensorRT that loads it.
#pragma once

#include "interface.h"
#include "registry.h"

namespace quartermap::host
{

struct Source
{
    quartermap::Registry registry;
    quartermap::LibraryHandle handle = nullptr;
    void* opened = nullptr; // by dlopen, for the C interface
    nvinfer1::IPluginCreatorV3One* creator = nullptr;
};

// Without a creator in it where there is none; the reason is on stderr, or a check failed.
Source from_library(char const* path);
Source from_registry(char const* tensorrt, char const* path);

// Has the registry let go of the library.
void let_go(Source const& source);

} // namespace quartermap::host
