#include "kernel_checks.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include "capabilities.h"
#include "checks.h"
#include "contract.h"
#include "device_memory.h"
#include "fields.h"
#include "golden_case.h"
#include "quartermap/selective_scan.h"
#include "scene.h"
#include "shapes.h"

namespace quartermap::host
{

using namespace nvinfer1;

namespace
{

Capabilities make(IPluginCreatorV3One& creator, Case const& golden)
{
    return Capabilities(FieldList().directions(golden.directions).softplus(golden.softplus).create(creator));
}

// The plugin of an execution context: made from what was serialised.
Capabilities in_context(IPluginCreatorV3One& creator, Capabilities const& built)
{
    Capabilities const loaded(
        creator.createPlugin("scan", built.runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    return Capabilities(loaded.runtime->attachToContext(nullptr));
}

// How often the emulated device prepared a kernel.
using Preparations = unsigned (*)();

// `preparations` is NULL for a real device.
void run_case(IPluginCreatorV3One& creator, Case const& golden, std::map<std::string, Capabilities>& shared,
    Preparations preparations)
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

} // namespace

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
    auto const preparations = reinterpret_cast<Preparations>(dlsym(library, "quartermap_emulation_preparations"));
    std::map<std::string, Capabilities> shared;
    for (Case const& golden : cases)
    {
        run_case(creator, golden, shared, preparations);
    }
    check_refusals(creator);
    if (!cases.empty())
    {
        check_recovery(library, creator, cases.front());
    }
    check_threads(creator, cases);
}

} // namespace quartermap::host
