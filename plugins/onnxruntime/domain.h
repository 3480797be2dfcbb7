// The domain `quartermap` with the operators of a library, as ONNX Runtime takes it.
#pragma once

#include <list>
#include <memory>

#include "interface.h"
#include "scan_operator.h"
#include "status.h"

namespace quartermap::onnxruntime
{

using DomainOwner = std::unique_ptr<Domain, void (*)(Domain*)>;

// Makes the domain with some operators, which have to outlive it.
inline DomainOwner make_domain(Api const& api, std::list<ScanOperator> const& scans)
{
    Domain* made = nullptr;
    check(api.CreateCustomOpDomain("quartermap", &made));
    DomainOwner domain(made, api.ReleaseCustomOpDomain);
    for (ScanOperator const& op : scans)
    {
        check(api.CustomOpDomain_Add(made, &op));
    }
    return domain;
}

} // namespace quartermap::onnxruntime
