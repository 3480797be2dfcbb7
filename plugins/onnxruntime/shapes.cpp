#include "shapes.h"

#include "status.h"

namespace quartermap::onnxruntime
{
namespace
{

using Sizes = std::vector<std::int64_t>;

void require_rank(Input const& input, char const* name, std::size_t rank, char const* axes)
{
    if (!input.present)
    {
        throw Refusal{INVALID_ARGUMENT, std::string("input ") + name + " is missing"};
    }
    if (input.sizes.size() != rank)
    {
        throw Refusal{INVALID_ARGUMENT,
            std::string("input ") + name + " is " + words(input.sizes) + ", expected " + axes};
    }
}

void require(Input const& input, char const* name, Sizes const& expected, char const* axes)
{
    require_rank(input, name, expected.size(), axes);
    if (input.sizes != expected)
    {
        throw Refusal{INVALID_ARGUMENT,
            std::string("input ") + name + " is " + words(input.sizes) + ", expected " + words(expected) + ", which is "
                + axes};
    }
}

void require_optional(Input const& input, char const* name, Sizes const& expected, char const* axes)
{
    if (input.present)
    {
        require(input, name, expected, axes);
    }
}

} // namespace

std::string words(Sizes const& sizes)
{
    std::string text = "(";
    for (std::size_t i = 0; i < sizes.size(); ++i)
    {
        text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
    }
    return text + ")";
}

QuartermapCpuScan map_sizes(std::vector<Input> const& inputs, std::int64_t directions)
{
    enum
    {
        X,
        DT,
        B,
        C,
        A,
        D,
        DT_BIAS,
        DT_WEIGHT
    };
    require_rank(inputs[X], "x", 4, "(batch, d_inner, H, W)");
    require_rank(inputs[A], "A", 2, "(K * d_inner, N)");
    Sizes const& x = inputs[X].sizes;
    std::int64_t const rows = directions * x[1];
    std::int64_t const states = inputs[A].sizes[1];
    require(inputs[A], "A", {rows, states}, "(K * d_inner, N)");
    require(inputs[B], "B", {x[0], directions * states, x[2], x[3]}, "(batch, K * N, H, W)");
    require(inputs[C], "C", {x[0], directions * states, x[2], x[3]}, "(batch, K * N, H, W)");
    require_optional(inputs[D], "D", {rows}, "(K * d_inner)");
    require_optional(inputs[DT_BIAS], "dt_bias", {rows}, "(K * d_inner)");

    QuartermapCpuScan scan{};
    if (inputs[DT_WEIGHT].present)
    {
        require_rank(inputs[DT_WEIGHT], "dt_weight", 2, "(K * d_inner, R)");
        scan.dt_rank = inputs[DT_WEIGHT].sizes[1];
        if (scan.dt_rank == 0)
        {
            throw Refusal{INVALID_ARGUMENT, "input dt_weight has rank 0, expected (K * d_inner, R) with R of 1 or more"};
        }
        require(inputs[DT_WEIGHT], "dt_weight", {rows, scan.dt_rank}, "(K * d_inner, R)");
        require(inputs[DT], "dt", {x[0], directions * scan.dt_rank, x[2], x[3]}, "(batch, K * R, H, W)");
    }
    else
    {
        require(inputs[DT], "dt", {x[0], rows, x[2], x[3]}, "(batch, K * d_inner, H, W)");
    }
    scan.batch = x[0];
    scan.groups = 1;
    scan.channels = x[1];
    scan.height = x[2];
    scan.width = x[3];
    scan.d_state = states;
    return scan;
}

QuartermapCpuScan sequence_sizes(std::vector<Input> const& inputs)
{
    enum
    {
        U,
        DELTA,
        A,
        B,
        C,
        D,
        DELTA_BIAS
    };
    require_rank(inputs[U], "u", 3, "(batch, K * d, L)");
    require_rank(inputs[A], "A", 2, "(K * d, N)");
    require_rank(inputs[B], "B", 4, "(batch, K, N, L)");
    Sizes const& u = inputs[U].sizes;
    std::int64_t const states = inputs[A].sizes[1];
    std::int64_t const groups = inputs[B].sizes[1];
    if (groups < 1 || u[1] % groups != 0)
    {
        throw Refusal{INVALID_ARGUMENT,
            "input B is " + words(inputs[B].sizes) + ", expected (batch, K, N, L) with a K that divides the "
                + std::to_string(u[1]) + " channels of u"};
    }
    require(inputs[DELTA], "delta", u, "(batch, K * d, L), as u");
    require(inputs[A], "A", {u[1], states}, "(K * d, N)");
    require(inputs[B], "B", {u[0], groups, states, u[2]}, "(batch, K, N, L)");
    require(inputs[C], "C", {u[0], groups, states, u[2]}, "(batch, K, N, L)");
    require_optional(inputs[D], "D", {u[1]}, "(K * d)");
    require_optional(inputs[DELTA_BIAS], "delta_bias", {u[1]}, "(K * d)");

    QuartermapCpuScan scan{};
    scan.batch = u[0];
    scan.groups = groups;
    scan.channels = u[1] / groups;
    scan.height = 1;
    scan.width = u[2];
    scan.d_state = states;
    return scan;
}

QuartermapCpuNorm norm_sizes(Input const& x, Input const& scale, Input const& bias)
{
    require_rank(x, "X", 4, "(batch, channels, height, width)");
    require(scale, "Scale", {x.sizes[1]}, "(channels)");
    require(bias, "B", {x.sizes[1]}, "(channels)");
    QuartermapCpuNorm norm{};
    norm.batch = x.sizes[0];
    norm.channels = x.sizes[1];
    norm.positions = x.sizes[2] * x.sizes[3];
    return norm;
}

} // namespace quartermap::onnxruntime
