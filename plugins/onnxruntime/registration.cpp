// What ONNX Runtime looks for in a library of custom operators.
#include <cstdlib>
#include <list>
#include <mutex>
#include <string>

#include "cpu_runner.h"
#include "domain.h"
#include "norm_operator.h"
#include "scan_operator.h"
#include "quartermap/cpu_scan.h"
#include "release.h"
#include "status.h"

namespace quartermap::onnxruntime
{
namespace
{

// How many threads a session has, which nothing in ONNX Runtime's interface tells; see docs/native.md.
constexpr char const* THREADS_KEY = "quartermap.threads";
constexpr int ELEMENT_TYPES[] = {FLOAT32, FLOAT16, BFLOAT16, FLOAT64};

// The operators for one ONNX Runtime and one number of threads. Sessions keep their addresses, and nobody says when the
// last of them is gone, so they stay, one set for all sessions alike.
struct Registered
{
    Api const* api;
    std::int32_t threads;
    Domain* domain;
    std::list<ScanOperator> scans;
    NormOperator norm;
};

std::int32_t threads_wanted(Api const& api, Options const* options)
{
    char text[16] = {};
    std::size_t size = sizeof(text);
    if (Status* const status = api.GetSessionConfigEntry(options, THREADS_KEY, text, &size))
    {
        api.ReleaseStatus(status);
        return 0;
    }
    long const threads = std::strtol(text, nullptr, 10);
    return threads > 0 && threads < 65536 ? static_cast<std::int32_t>(threads) : 0;
}

Registered const& registered(Api const& api, std::int32_t threads, bool infers)
{
    static std::mutex mutex;
    static auto* const all = new std::list<Registered>;
    std::lock_guard<std::mutex> const lock(mutex);
    for (Registered const& one : *all)
    {
        if (one.api == &api && one.threads == threads)
        {
            return one;
        }
    }
    std::list<Registered> made;
    Registered& found = made.emplace_back(Registered{&api, threads, nullptr, {}, norm_operator(api, threads)});
    for (int const type : ELEMENT_TYPES)
    {
        found.scans.push_back(scan_operator(api, true, type, threads, infers, cpu_provider()));
        found.scans.push_back(scan_operator(api, false, type, threads, infers, cpu_provider()));
    }
    DomainOwner owner = make_domain(api, found.scans);
    check(api.CustomOpDomain_Add(owner.get(), &found.norm));
    found.domain = owner.get();
    all->splice(all->end(), made); // moves no operator
    static_cast<void>(owner.release());
    return all->back();
}

} // namespace
} // namespace quartermap::onnxruntime

extern "C" QUARTERMAP_CPU_API quartermap::onnxruntime::Status* QUARTERMAP_ORT_CALL RegisterCustomOps(
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
            if (std::string(quartermap_cpu_instruction_set()) == "none")
            {
                throw Refusal{NOT_IMPLEMENTED,
                    "quartermap: QUARTERMAP_INSTRUCTION_SET names an instruction set that this library or this "
                    "processor does not have"};
            }
            forget_orders();
            bool const infers = can_infer(base->GetVersionString());
            check(api->AddCustomOpDomain(options, registered(*api, threads_wanted(*api, options), infers).domain));
        });
}
