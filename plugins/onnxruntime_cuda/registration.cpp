// What ONNX Runtime looks for in a library of custom operators: here SelectiveScan2D for its CUDA provider.
#include <list>
#include <mutex>
#include <string>

#include "cuda_runner.h"
#include "domain.h"
#include "quartermap/selective_scan.h"
#include "release.h"
#include "scan_operator.h"
#include "status.h"

namespace quartermap::onnxruntime
{
namespace
{

constexpr int ELEMENT_TYPES[] = {FLOAT32, FLOAT16, BFLOAT16};

// The operators for one ONNX Runtime. Sessions keep their addresses, and nobody says when the last of them is gone, so
// they stay, one set for all sessions.
struct Registered
{
    Api const* api;
    Domain* domain;
    std::list<ScanOperator> scans;
};

Domain* registered(Api const& api, bool infers)
{
    static std::mutex mutex;
    static auto* const all = new std::list<Registered>;
    std::lock_guard<std::mutex> const lock(mutex);
    for (Registered const& one : *all)
    {
        if (one.api == &api)
        {
            return one.domain;
        }
    }
    std::list<Registered> made;
    Registered& found = made.emplace_back(Registered{&api, nullptr, {}});
    for (int const type : ELEMENT_TYPES)
    {
        found.scans.push_back(scan_operator(api, true, type, 0, infers, cuda_provider()));
    }
    DomainOwner owner = make_domain(api, found.scans);
    found.domain = owner.get();
    all->splice(all->end(), made); // moves no operator
    static_cast<void>(owner.release());
    return all->back().domain;
}

} // namespace
} // namespace quartermap::onnxruntime

extern "C" QUARTERMAP_API quartermap::onnxruntime::Status* QUARTERMAP_ORT_CALL RegisterCustomOps(
    quartermap::onnxruntime::Options* options, quartermap::onnxruntime::ApiBase const* base)
{
    using namespace quartermap::onnxruntime;
    Api const* const api = base->GetApi(API_VERSION);
    if (api == nullptr)
    {
        return too_old(*base);
    }
    return guarded(*api,
        [&]
        {
            forget_orders();
            check(api->AddCustomOpDomain(options, registered(*api, can_infer(base->GetVersionString()))));
        });
}
