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
#include <cstdio>
#include <cstring>

#include "checks.h"
#include "creator_source.h"
#include "device_memory.h"
#include "kernel_checks.h"
#include "plugin_checks.h"

using namespace quartermap::host;

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
    if (source.creator == nullptr || source.opened == nullptr)
    {
        return 1;
    }
    nvinfer1::IPluginCreatorV3One& creator = *source.creator;
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
        run_cases(source.opened, creator, argv[first + 1]);
    }
    let_go(source);
    std::printf("%d checks, %d failed\n", checks(), failures());
    if (skipped != nullptr)
    {
        std::printf("SKIPPED: the kernel was not run, as %s\n", skipped);
    }
    return failures() > 0 ? 1 : skipped != nullptr ? 77 : 0;
}
