#include "scene.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "shapes.h"

namespace quartermap::host
{

using namespace nvinfer1;

Scene::Scene(Case const& golden)
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

bool Scene::configure(Capabilities const& plugin)
{
    DynamicPluginTensorDesc const out = descs_[0];
    bool const fine = plugin.build->configurePlugin(descs_.data(), count(), &out, 1) == 0;
    workspace_ = std::make_unique<Memory>(plugin.build->getWorkspaceSize(descs_.data(), count(), &out, 1));
    return fine && fine_;
}

bool Scene::tell(Capabilities const& plugin) const
{
    return plugin.runtime->onShapeChange(plain_.data(), count(), &plain_[0], 1) == 0;
}

bool Scene::enqueue(Capabilities const& plugin)
{
    void* const outputs[] = {y_.get()};
    return plugin.runtime->enqueue(
               plain_.data(), &plain_[0], inputs_.data(), outputs, workspace_->get(), nullptr)
        == 0;
}

double Scene::run(Capabilities const& plugin)
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

bool Scene::close(Capabilities const& plugin)
{
    return run(plugin) <= golden_.tolerance;
}

std::int32_t Scene::count() const
{
    return static_cast<std::int32_t>(plain_.size());
}

} // namespace quartermap::host
