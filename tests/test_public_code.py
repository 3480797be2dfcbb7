"""`public_code()`: what it supplies and redirects, what it refuses, and that everything is what it was afterwards."""

from __future__ import annotations

import builtins
import gc
import importlib
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import error
from spellings import SPELLINGS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import quartermap_deploy as qm
from quartermap_deploy.errors import ExportError, UnknownNameError, UnsupportedScanError
from quartermap_deploy.scan.definition import cross_merge, cross_scan, selective_scan_definition

TOLERANCE = 1e-5
NAMES = sorted(SPELLINGS)


class Scans(TorchDispatchMode):
    """Counts the scans of a run; with `silent` they all return zeros."""

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.count, self.silent = 0, silent

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.quartermap.selective_scan.default:
            self.count += 1
            return torch.zeros_like(result) if self.silent else result
        return result


def as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


@torch.no_grad()
def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with qm.public_code(model):
        return as_list(model(*inputs))


# Whole models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_spelling_calls_its_scans_and_they_matter(name: str) -> None:
    spelling = SPELLINGS[name]
    model, inputs = spelling.make(), spelling.examples()
    with Scans() as scans:
        outputs = run(model, inputs)
    assert scans.count == spelling.scans
    with Scans(silent=True):
        without = run(model, inputs)
    assert all(error(a, b) > 0.02 for a, b in zip(without, outputs, strict=True))


def test_there_are_enough_spellings() -> None:
    assert len({spelling.module for spelling in SPELLINGS.values()}) >= 12
    assert any(len(spelling.inputs) > 1 for spelling in SPELLINGS.values())
    for spelling in SPELLINGS.values():
        assert (spelling.maps == spelling.scans) or spelling.why_not


# What is left behind ------------------------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    """All that a block may change."""
    modules = {
        name: id(module)
        for name, module in sys.modules.items()
        if name.split(".")[0] in ("mamba_ssm", "causal_conv1d", "causal_conv1d_cuda", "triton")
        or name.startswith("selective_scan")
    }
    return {
        "finders": list(map(id, sys.meta_path)),
        "import": builtins.__import__,
        "device": torch.cuda.device,
        "modules": modules,
        "cuda": torch.Tensor.cuda,
        "function modes": torch.overrides._get_current_function_mode_stack(),
    }


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write the files of a repository whose modules can be imported, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(packages: dict[str, str] | None = None, **modules: str) -> None:
        for name, text in {**(packages or {}), **modules}.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


LOOP = """
import torch

def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                       return_last_state=False):
    raise AssertionError("the loop ran")
"""
MODEL = """
import torch
from torch import nn
from {package} import {scan}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scan = {scan}
        self.A = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x):
        states = x[:, :2]
        return self.scan(x, x, -torch.exp(self.A), states, states)
"""
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def expected(model: nn.Module, x: Tensor = X) -> Tensor:
    """What MODEL returns."""
    states = x[:, None, :2]
    A = -torch.exp(model.A.detach())  # type: ignore[operator]
    return selective_scan_definition(x.double(), x.double(), A.double(), states.double(), states.double())


def made(name: str) -> nn.Module:
    model: nn.Module = importlib.import_module(name).Model().eval()
    return model


def test_everything_is_restored() -> None:
    before = state()
    with qm.public_code() as block:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        assert module.selective_scan_fn is qm.selective_scan
        import selective_scan_cuda_oflex  # noqa: F401

        assert state() != before
    assert state() == before
    assert {"mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda_oflex"} <= set(block.supplied)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")


def test_everything_is_restored_after_an_error(repository: Callable[..., None]) -> None:
    repository(ours_ops=LOOP, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"))
    model = made("ours_model")
    function = sys.modules["ours_ops"].selective_scan_ref
    before, code = state(), function.__code__
    with pytest.raises(KeyError, match="planned"), qm.public_code(model):
        assert function.__code__ is not code
        raise KeyError("planned")
    assert state() == before and function.__code__ is code
    with pytest.raises(AssertionError, match="the loop ran"):
        model(X)


def test_an_error_on_entry_restores_everything(repository: Callable[..., None]) -> None:
    repository(ours_ops=LOOP, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"))
    model = made("ours_model")
    before, code = state(), sys.modules["ours_ops"].selective_scan_ref.__code__
    with pytest.raises(UnknownNameError), qm.public_code(model, {"ours_ops:nothing": qm.selective_scan}):
        pass
    assert state() == before and sys.modules["ours_ops"].selective_scan_ref.__code__ is code


def test_imported_code_keeps_working_in_later_blocks(repository: Callable[..., None]) -> None:
    late = MODEL.format(package="os", scan="path") + (
        "\n    def forward(self, x):\n"
        "        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\n"
        "        return selective_scan_fn(x, x, -torch.exp(self.A), x[:, :2], x[:, :2])\n"
    )
    repository(
        ours_ops=LOOP, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"), ours_late=late
    )
    with qm.public_code():
        models = [made("ours_model"), made("ours_late")]
    gc.collect()
    for model in models:
        for given in (None, model):
            with qm.public_code(given), torch.no_grad():
                assert error(model(X), expected(model)) <= TOLERANCE
    with pytest.raises(AssertionError, match="the loop ran"):
        models[0](X)


def test_what_failed_to_import_is_supplied(repository: Callable[..., None]) -> None:
    text = """
import torch
from torch import nn
try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except:
    pass
try:
    import selective_scan_cuda_core
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None

class Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        return selective_scan_cuda_core.fwd(*tensors, None, None, False, 1)[0]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x):
        A, states = -torch.exp(self.A), x[:, :2]
        weight = torch.tensor([[0.0, 1.0]]).expand(4, 2)
        y = selective_scan_fn(causal_conv1d_fn(x, weight), x, A, states, states)
        return y, Core.apply(x, x, A, states, states)
"""
    repository(ours_model=text)
    model = made("ours_model")
    space = vars(sys.modules["ours_model"])
    before = dict(space)
    with qm.public_code(model) as block, torch.no_grad():
        assert all(error(y, expected(model)) <= TOLERANCE for y in model(X))
    assert dict(space) == before
    assert sum("was undefined" in name for name in block.redirected) == 3
    with pytest.raises(NameError):
        model(X)


def test_blocks_nest(repository: Callable[..., None]) -> None:
    repository(ours_ops=LOOP, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"))
    model = made("ours_model")
    with torch.no_grad(), qm.public_code(model):
        with qm.public_code():
            pass
        with qm.public_code(
            model, {"ours_ops:selective_scan_ref": lambda *tensors: 2 * qm.selective_scan(*tensors)}
        ):
            assert error(model(X), 2 * expected(model)) <= TOLERANCE
            with qm.public_code(model):
                assert error(model(X), 2 * expected(model)) <= TOLERANCE
        assert error(model(X), expected(model)) <= TOLERANCE
    with pytest.raises(AssertionError, match="the loop ran"):
        model(X)


def test_a_block_counts_what_is_imported_after_one_inside_it(repository: Callable[..., None]) -> None:
    with pytest.raises(KeyError), qm.public_code() as outer:
        with qm.public_code() as inner:
            pass
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        assert "mamba_ssm" in outer.supplied and not inner.supplied
        raise KeyError
    assert "mamba_ssm" not in sys.modules


def test_blocks_of_two_threads_may_close_in_any_order(repository: Callable[..., None]) -> None:
    repository(ours_ops=LOOP, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"))
    model, before = made("ours_model"), state()
    opened, first_closed = threading.Event(), threading.Event()
    results: list[float] = []

    def other() -> None:
        with torch.no_grad(), qm.public_code(model):
            opened.set()
            first_closed.wait(60)
            results.append(error(model(X), expected(model)))

    thread = threading.Thread(target=other)
    with qm.public_code(model):
        thread.start()
        assert opened.wait(60)
    first_closed.set()
    thread.join(60)
    assert results and results[0] <= TOLERANCE
    assert state() == before
    with pytest.raises(AssertionError, match="the loop ran"):
        model(X)


# What is there already ----------------------------------------------------------------------------------------------


def test_packages_that_are_loaded_are_redirected(repository: Callable[..., None]) -> None:
    interface = (
        LOOP
        + """
import selective_scan_cuda

class Fn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        return selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0]

def closed():
    run = Fn.apply
    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):
        return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    return selective_scan_fn

selective_scan_fn = closed()
"""
    )
    kernel = "def fwd(*tensors):\n    raise RuntimeError('needs CUDA')\n\nbwd = fwd\n"
    model = MODEL.format(package="mamba_ssm.ops.selective_scan_interface", scan="selective_scan_fn")
    repository(
        {
            "mamba_ssm/__init__": "",
            "mamba_ssm/ops/__init__": "",
            "mamba_ssm/ops/selective_scan_interface": interface,
        },
        selective_scan_cuda=kernel,
        ours_model=model.replace("A), states, states)", "A), states.unsqueeze(1), states.unsqueeze(1))"),
    )
    model = made("ours_model")
    module = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    codes = {name: getattr(module, name).__code__ for name in ("selective_scan_ref", "selective_scan_fn")}
    native = sys.modules["selective_scan_cuda"].fwd
    for given in (None, model):
        with qm.public_code(given) as block, torch.no_grad():
            assert error(model(X), expected(model)) <= TOLERANCE
            states = X[:, None, :2]
            direct = module.Fn.apply(X, X, -torch.exp(model.A), states, states)
            assert error(direct, expected(model)) <= TOLERANCE
            assert sys.modules["selective_scan_cuda"].fwd is not native
        assert any("selective_scan_fn" in name for name in block.redirected)
        assert {name: getattr(module, name).__code__ for name in codes} == codes
        assert sys.modules["selective_scan_cuda"].fwd is native
    with pytest.raises(RuntimeError, match="needs CUDA"):
        model(X)


def test_what_is_installed_but_broken_is_replaced(repository: Callable[..., None]) -> None:
    repository(
        {
            "mamba_ssm/__init__": "from mamba_ssm.utils.generation import GenerationMixin\nlocal = 1",
            "mamba_ssm/utils/__init__": "",
            "mamba_ssm/utils/generation": "from a_package_for_language_models import TextStreamer",
        },
        selective_scan_cuda_core="raise ImportError('undefined symbol: _ZN3c10')",
        ours_broken="import a_package_that_is_missing",
    )
    before = state()
    with qm.public_code() as block:
        kernel = importlib.import_module("selective_scan_cuda_core")
        package = importlib.import_module("mamba_ssm")
        assert block.supplied == ["selective_scan_cuda_core", "mamba_ssm.utils.generation"]
        assert package.local == 1 and isinstance(package.GenerationMixin, type)
        states = X[:, None, :2]
        A = -torch.ones(4, 2)
        y = kernel.fwd(X, X, A, states, states, None, None, False, 1)[0]
        assert error(y, selective_scan_definition(X, X, A, states, states)) <= TOLERANCE
        with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
            importlib.import_module("ours_broken")
    for name in ("mamba_ssm", "mamba_ssm.utils"):
        sys.modules.pop(name, None)
    assert state() == before


def test_code_of_others_is_left_alone(repository: Callable[..., None]) -> None:
    """A loop of somebody else's, with which results are compared, must not become what it is compared with."""
    repository(
        ours_ops=LOOP,
        ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"),
        theirs=LOOP,
    )
    model, theirs = made("ours_model"), importlib.import_module("theirs")
    with qm.public_code(model), pytest.raises(AssertionError, match="the loop ran"):
        theirs.selective_scan_ref(X, X, model.A, X, X)


def test_loops_as_methods_and_with_the_channels_last(repository: Callable[..., None]) -> None:
    text = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(4, 2))

    def selective_scan(self, u, delta, A, B, C, D):
        raise AssertionError("the loop ran")

    def forward(self, x):
        tokens = x.transpose(1, 2)
        states = tokens[..., :2]
        return self.selective_scan(tokens, tokens, -torch.exp(self.A), states, states, None).transpose(1, 2)
"""
    repository(ours_model=text)
    model = made("ours_model")
    for x in (X, X[..., :4], X[..., :3]):
        with qm.public_code(model), torch.no_grad():
            assert error(model(x), expected(model, x)) <= TOLERANCE
    # As many positions as channels as states: mamba-ssm's interface is known, a plain loop's is not.
    with qm.public_code(model), pytest.raises(UnsupportedScanError, match="either axis"):
        square = X[..., :4]
        model.selective_scan(square, square, model.A, square[:, :2, :2], square[:, :2, :2], None)  # type: ignore[operator]


@torch.no_grad()
def test_the_interface_of_mamba_ssm_has_its_channels_first(repository: Callable[..., None]) -> None:
    repository(ours_ops=LOOP, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"))
    model = made("ours_model")
    model.A = nn.Parameter(torch.zeros(2, 2))
    square = X[:, :2, :2]
    with qm.public_code(model):
        assert error(model(square), expected(model, square)) <= TOLERANCE


def test_gradients_of_kernels_are_refused(repository: Callable[..., None]) -> None:
    text = """
import torch

class Fn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        ctx.save_for_backward(u)
        return u

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad, None, None, None, None
"""
    repository(ours_ops=text)
    with qm.public_code():
        fn = importlib.import_module("ours_ops").Fn
        x, states = X.clone().requires_grad_(), X[:, :2]
        y = fn.apply(x, x.detach(), -torch.ones(4, 2), states, states)
        with pytest.raises(UnsupportedScanError, match=r"the gradient of ours_ops\.Fn"):
            y.sum().backward()
        # The functions themselves are differentiable.
        qm.selective_scan(x, x, -torch.ones(4, 2), states, states).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


def test_torch_never_sees_a_triton(repository: Callable[..., None]) -> None:
    text = """
import triton
import triton.language as tl
from triton.language.extra import libdevice

@triton.heuristics({"EVEN": lambda args: True})
@triton.autotune(configs=[triton.Config({"BLOCK": 2 ** n}, num_warps=4) for n in range(3)], key=["n"])
@triton.jit
def kernel(x, n: tl.constexpr, BLOCK: tl.constexpr = 1):
    tl.store(x, tl.load(x) + 1)

LIMIT = triton.next_power_of_2(triton.cdiv(100, 7))
version = triton.__version__

def launch(x):
    kernel[(4,)](x, 1)
"""
    if importlib.util.find_spec("triton") is not None:
        pytest.skip("Triton is installed here, so that there is nothing to stand in for")
    repository(ours_kernels=text)
    from torch.utils._triton import has_triton_package

    with qm.public_code():
        kernels = importlib.import_module("ours_kernels")
        assert kernels.LIMIT == 16 and kernels.version
        has_triton_package.cache_clear()
        assert not has_triton_package()
        assert "triton" not in sys.modules and importlib.util.find_spec("triton") is None
        with pytest.raises(UnsupportedScanError, match=r"Triton kernel ours_kernels\.kernel"):
            kernels.launch(X)
    assert not has_triton_package()


TRITON_MAPS = """
import torch, triton

@triton.jit
def unroll(x, y):
    pass

class CrossScanTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        unroll[(1,)](x, x)

class CrossScanTriton1b1(CrossScanTriton):
    @staticmethod
    def forward(ctx, x):
        unroll[(1,)](x, x)

class CrossMergeTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        unroll[(1,)](y, y)

class Other(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        unroll[(1,)](y, y)
"""


def test_maps_are_unrolled_without_triton(repository: Callable[..., None]) -> None:
    repository(ours_csm=TRITON_MAPS)
    maps = torch.randn(2, 4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        with qm.public_code():
            csm = importlib.import_module("ours_csm")
            assert torch.equal(csm.CrossScanTriton.apply(maps[:, 0]), cross_scan(maps[:, 0]))
            each = csm.CrossScanTriton1b1.apply(maps)
            for k in range(4):
                assert torch.equal(each[:, k], cross_scan(maps[:, k])[:, k])
            merged = csm.CrossMergeTriton.apply(maps)
            assert error(merged, cross_merge(maps.flatten(3), 2, 5).flatten(2)) <= TOLERANCE
            with pytest.raises(UnsupportedScanError, match=r"Triton kernel ours_csm\.unroll"):
                csm.Other.apply(maps)


@torch.no_grad()
def test_cuda_becomes_the_cpu() -> None:
    layer = nn.Linear(6, 3)
    with qm.public_code():
        assert torch.empty(2, 3).cuda().device.type == "cpu"
        assert torch.zeros(2, device="cuda:0").device.type == "cpu"
        assert torch.ones(2).to("cuda").device.type == "cpu"
        assert X.new_zeros(2, device=torch.device("cuda")).device.type == "cpu"
        assert X.to(device="cuda", dtype=torch.float64).dtype == torch.float64
        assert layer.cuda()(X).shape == (2, 4, 3)
        assert layer.to("cuda").weight.device.type == "cpu"
        with torch.cuda.device(X.device), torch.cuda.device(X.device.index):
            pass
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            X.cuda()


# The functions ------------------------------------------------------------------------------------------------------


def scan_arguments(groups: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Random arguments of a scan in float64, with two channels for each group and three states."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    channels, states = 4, 3
    return {
        "u": normal(2, channels, length),
        "delta": normal(2, channels, length),
        "A": -normal(channels, states).exp(),
        "B": normal(2, groups, states, length),
        "C": normal(2, groups, states, length),
        "D": normal(channels),
        "delta_bias": normal(channels),
    }


def by_definition(**arguments: Any) -> Tensor:
    return selective_scan_definition(**{"delta_softplus": True, **arguments})


def test_the_scan_is_the_definition() -> None:
    arguments = scan_arguments()
    wanted = by_definition(**arguments)
    assert error(qm.selective_scan(**arguments, delta_softplus=True), wanted) <= 1e-12
    z = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gated = qm.selective_scan(**arguments, z=z, delta_softplus=True)
    assert error(gated, wanted * functional.silu(z)) <= 1e-12


def test_the_scan_takes_every_shape_of_its_matrices() -> None:
    arguments = scan_arguments(groups=1)
    wanted = by_definition(**arguments)
    single = {**arguments, "B": arguments["B"][:, 0], "C": arguments["C"][:, 0]}
    assert error(qm.selective_scan(**single, delta_softplus=True), wanted) <= 1e-12
    # B does not depend on the input; C has two groups.
    two = scan_arguments(groups=2)
    constant = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wide = constant[None, :, :, None].expand(2, -1, -1, 7)
    wanted = by_definition(**{**two, "B": wide, "C": two["C"].repeat_interleave(2, dim=1)})
    assert error(qm.selective_scan(**{**two, "B": constant}, delta_softplus=True), wanted) <= 1e-12
    # One group of B, two of C.
    wanted = by_definition(**{**two, "B": two["B"][:, :1].expand(-1, 2, -1, -1)})
    found = qm.selective_scan(**{**two, "B": two["B"][:, :1]}, delta_softplus=True)
    assert error(found, wanted) <= 1e-12


def test_the_scan_keeps_the_type_of_its_input() -> None:
    arguments = {name: value.float() for name, value in scan_arguments().items()}
    half = {n: v.half() if n in ("u", "delta", "B", "C") else v for n, v in arguments.items()}
    rounded = {name: value.double() for name, value in half.items()}
    y = qm.selective_scan(**half, delta_softplus=True)
    assert y.dtype == torch.float16 and error(y, by_definition(**rounded)) <= 1e-3
    with qm.public_code():
        import selective_scan_cuda_oflex as oflex

        *tensors, D, bias = half.values()
        y = oflex.fwd(*tensors, D, bias, True, 1, True)[0]
        assert y.dtype == torch.float32 and error(y, by_definition(**rounded)) <= TOLERANCE
        assert oflex.fwd(*tensors, D, bias, True, 1, False)[0].dtype == torch.float16


@pytest.mark.parametrize("name", ["core", "nrow", "oflex", "ndstate"])
def test_kernels_without_a_gate(name: str) -> None:
    arguments = scan_arguments()
    *tensors, D, bias = arguments.values()
    with qm.public_code():
        kernel = importlib.import_module(f"selective_scan_cuda_{name}")
        y, states = kernel.fwd(*tensors, D, bias, True, 1)
        assert error(y, by_definition(**arguments)) <= 1e-12
        assert states.isnan().all()
        with pytest.raises(UnsupportedScanError, match=rf"selective_scan_cuda_{name}\.bwd"):
            kernel.bwd(*tensors)
        if name == "ndstate":
            one = {**arguments, "A": arguments["A"][:, :1]}
            one |= {key: arguments[key][:, :, :1] for key in "BC"}
            flat = (one["u"], one["delta"], one["A"][:, 0], one["B"][:, :, 0], one["C"][:, :, 0])
            assert error(kernel.fwd(*flat, D, bias, True, 1)[0], by_definition(**one)) <= 1e-12


def test_the_kernel_with_a_gate() -> None:
    arguments = scan_arguments()
    *tensors, D, bias = arguments.values()
    with qm.public_code():
        import selective_scan_cuda

        y, _, gated = selective_scan_cuda.fwd(*tensors, D, tensors[0], bias, True)
    wanted = by_definition(**arguments)
    assert error(y, wanted) <= 1e-12
    assert error(gated, wanted * functional.silu(tensors[0])) <= 1e-12


@torch.no_grad()
def test_the_causal_convolution() -> None:
    layer = nn.Conv1d(4, 4, 3, groups=4, padding=2)
    wanted = layer(X)[..., :6]
    weight = layer.weight.flatten(1)
    with qm.public_code():
        import causal_conv1d_cuda
        from causal_conv1d import causal_conv1d_fn
        from causal_conv1d.cpp_functions import causal_conv1d_fwd_function

    assert error(causal_conv1d_fn(X, weight, layer.bias), wanted) <= TOLERANCE
    for activated in (
        causal_conv1d_fn(X, weight, layer.bias, activation="silu"),
        causal_conv1d_fn(X, weight, layer.bias, "silu"),
        causal_conv1d_cuda.causal_conv1d_fwd(X, weight, layer.bias, True),
        causal_conv1d_cuda.causal_conv1d_fwd(X, weight, layer.bias, None, None, None, True),
        causal_conv1d_fwd_function(X, weight, layer.bias, None, None, None, True),
    ):
        assert error(activated, functional.silu(wanted)) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_the_mamba_block(kind: str) -> None:
    """Against mamba-ssm's slow path, written out for one direction at a time, with the definition of the scan."""
    with qm.public_code():
        from mamba_ssm.modules.mamba_simple import Mamba

        torch.manual_seed(0)
        block = Mamba(d_model=6, d_state=3, d_conv=4, bimamba_type=kind, if_devide_out=True)
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    block, x = block.double(), torch.randn(2, 5, 6).double()

    def way(xz: Tensor, suffix: str, A_log: Tensor, before: Tensor | None = None) -> Tensor:
        inside, z = xz.chunk(2, dim=1)
        convolution = getattr(block, f"conv1d{suffix}")
        if before is None:
            before = functional.silu(convolution(inside)[..., : inside.shape[-1]])
        dt, B, C = (
            getattr(block, f"x_proj{suffix}")(before.transpose(1, 2))
            .transpose(1, 2)
            .split([block.dt_rank, 3, 3], dim=1)
        )
        project = getattr(block, f"dt_proj{suffix}")
        delta = torch.einsum("dr,brl->bdl", project.weight, dt)
        y = by_definition(
            u=before,
            delta=delta,
            A=-A_log.exp(),
            B=B[:, None],
            C=C[:, None],
            D=getattr(block, f"D{suffix}"),
            delta_bias=project.bias,
        )
        return y * functional.silu(z)

    xz = block.in_proj(x).transpose(1, 2)
    y = way(xz, "", block.A_log)
    if kind == "v2":
        y = (y + way(xz.flip(-1), "_b", block.A_b_log).flip(-1)) / 2
    elif kind == "v1":
        # The convolution looks back along the way there, and is shared.
        there = functional.silu(block.conv1d(xz.chunk(2, dim=1)[0])[..., :5])
        y = y + way(xz.flip(-1), "", block.A_b_log, there.flip(-1)).flip(-1)
    assert error(block(x), block.out_proj(y.transpose(1, 2))) <= 1e-6  # A and D are taken in float32
    names = {name.partition(".")[0] for name, _ in block.named_parameters()}
    plain = {"in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj"}
    backwards = {
        "none": set(),
        "v1": {"A_b_log"},
        "v2": {"conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b"},
    }
    assert names == plain | backwards[kind]


@torch.no_grad()
def test_the_norms() -> None:
    with qm.public_code():
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
    weight, bias, residual = torch.randn(6), torch.randn(6), torch.randn(2, 4, 6)
    wanted = functional.rms_norm(X + residual, (6,), weight, 1e-3)
    y, kept = rms_norm_fn(X, weight, None, residual=residual, eps=1e-3, prenorm=True, residual_in_fp32=True)
    assert error(y, wanted) <= TOLERANCE and error(kept, X + residual) <= TOLERANCE
    norm = RMSNorm(6, eps=1e-3)
    norm.weight.copy_(weight)
    assert error(norm(X, residual), wanted) <= TOLERANCE
    y = layer_norm_fn(X, weight, bias, residual=residual, eps=1e-3)
    assert error(y, functional.layer_norm(X + residual, (6,), weight, bias, 1e-3)) <= TOLERANCE
    half = rms_norm_fn(X.half(), weight, None, residual=residual, prenorm=True, residual_in_fp32=True)
    assert half[0].dtype == torch.float16 and half[1].dtype == torch.float32


# Refusals -----------------------------------------------------------------------------------------------------------


def _scan(**changes: Any) -> None:
    qm.selective_scan(**{**scan_arguments(), **changes})


def _package(path: str, *arguments: Any, **keywords: Any) -> None:
    module, name = path.split(":")
    with qm.public_code():
        getattr(importlib.import_module(module), name)(*arguments, **keywords)


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "last state": (lambda: _scan(return_last_state=True), "return_last_state=True"),
    "complex A": (lambda: _scan(A=torch.zeros(4, 3, dtype=torch.complex64)), "complex A"),
    "complex B": (lambda: _scan(B=torch.zeros(2, 2, 3, 7, dtype=torch.complex64)), "complex B"),
    "B of another size": (lambda: _scan(B=torch.zeros(2, 2, 5, 7)), r"B \(2, 2, 5, 7\)"),
    "groups that do not divide": (lambda: _scan(C=torch.zeros(2, 3, 3, 7)), r"C \(2, 3, 3, 7\)"),
    "other channels": (lambda: _scan(delta=torch.zeros(2, 2, 7)), "4 channels in u, 2 in delta"),
    "a vector": (lambda: _scan(u=torch.zeros(7)), r"u \(7,\)"),
    "states of the convolution": (
        lambda: _package("causal_conv1d:causal_conv1d_fn", X, X[0, :, :2], return_final_states=True),
        "causal_conv1d_fn",
    ),
    "one step of the convolution": (lambda: _package("causal_conv1d:causal_conv1d_update", X), "_update"),
    "dropout in a norm": (
        lambda: _package("mamba_ssm.ops.triton.layernorm:rms_norm_fn", X, X[0, 0], None, dropout_p=0.1),
        "dropout",
    ),
    "another Mamba": (lambda: _package("mamba_ssm:Mamba", 8, bimamba_type="v3"), "bimamba_type='v3'"),
    "Mamba-2": (lambda: _package("mamba_ssm:Mamba2", 8), "Mamba-2"),
    "a cache": (lambda: _package("mamba_ssm.utils.hf:load_config_hf", "x"), "load_config_hf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(UnsupportedScanError, match=message):
        call()
    assert issubclass(UnsupportedScanError, ExportError)


def test_a_refusal_reaches_the_user_of_the_compiler(repository: Callable[..., None]) -> None:
    from quartermap_deploy.sources.modules import module_source

    repository(
        ours_ops=LOOP,
        ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref").replace(
            "states, states)", "states, states, return_last_state=True)"
        ),
    )
    with pytest.raises(
        UnsupportedScanError, match=r"^the model calls selective_scan_fn\(return_last_state=True\)"
    ):
        module_source(made("ours_model"), X)


def test_an_argument_that_is_not_known_is_refused(repository: Callable[..., None]) -> None:
    loop = LOOP.replace("return_last_state=False", "return_last_state=False, reverse=False, nrows=1")
    repository(ours_ops=loop, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"))
    model = made("ours_model")
    scan = sys.modules["ours_ops"].selective_scan_ref
    with qm.public_code(model), torch.no_grad():
        assert error(model(X), expected(model)) <= TOLERANCE
        states = X[:, :2]
        assert scan(X, X, model.A, states, states, nrows=4).shape == X.shape
        with pytest.raises(UnsupportedScanError, match=r"ours_ops\.selective_scan_ref with reverse"):
            scan(X, X, model.A, states, states, reverse=True)
        with pytest.raises(UnsupportedScanError, match="return_last_state"):
            scan(X, X, model.A, states, states, return_last_state=True)


# Scans that the user names -------------------------------------------------------------------------------------------

UNKNOWN = """
import torch

def my_scan(sequence, step, decay, *, states):
    raise AssertionError("the loop ran")

class Holder:
    @staticmethod
    def scan(sequence, step, decay, states):
        raise AssertionError("the loop ran")

class Fn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sequence, step, decay, states):
        raise AssertionError("the loop ran")

class SetUp(torch.autograd.Function):
    @staticmethod
    def forward(sequence, step, decay, states):
        raise AssertionError("the loop ran")

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

native = len
number = 3
"""
CALLS = """
import torch, ours_ops
from torch import nn
from ours_ops import my_scan as renamed

class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call
        self.A = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x):
        A, states = -torch.exp(self.A), x[:, :2]
        if self.call == "function":
            return renamed(x, x, A, states=states)
        if self.call == "method":
            return ours_ops.Holder.scan(x, x, A, states)
        if self.call == "native":
            return ours_ops.native(x, x, A, states)
        return (ours_ops.Fn if self.call == "autograd" else ours_ops.SetUp).apply(x, x, A, states)
"""
PATHS = {
    "function": "ours_ops:my_scan",
    "method": "ours_ops:Holder.scan",
    "native": "ours_ops:native",
    "autograd": "ours_ops:Fn",
    "set up": "ours_ops:SetUp",
}


def adapter(sequence: Tensor, step: Tensor, decay: Tensor, states: Tensor) -> Tensor:
    return qm.selective_scan(sequence, step, decay, states, states)


@pytest.mark.parametrize("call", PATHS)
def test_an_adapter_takes_the_place_of_a_scan(call: str, repository: Callable[..., None]) -> None:
    repository(ours_ops=UNKNOWN, ours_model=CALLS)
    model = importlib.import_module("ours_model").Model(call)
    before = dict(vars(sys.modules["ours_ops"]))
    with qm.public_code(model, scans={PATHS[call]: adapter}) as block, torch.no_grad():
        assert error(model(X), expected(model)) <= TOLERANCE
        assert PATHS[call].replace(":", ".") in block.redirected
    assert vars(sys.modules["ours_ops"]) == before
    with pytest.raises((AssertionError, TypeError)):
        model(X)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ours_opps:my_scan", "unknown module in scans= 'ours_opps'. Did you mean ours_ops?"),
        ("ours_ops:my_scam", "Did you mean my_scan?"),
        ("ours_ops:Holder.skan", "Did you mean scan?"),
        ("ours_ops", "'package.module:function'"),
        ("ours_ops:number", "a int; expected a function"),
    ],
)
def test_a_scan_that_is_not_there(path: str, message: str, repository: Callable[..., None]) -> None:
    repository(ours_ops=UNKNOWN)
    importlib.import_module("ours_ops")
    before = state()
    with (
        pytest.raises((UnknownNameError, UnsupportedScanError)) as caught,
        qm.public_code(scans={path: adapter}),
    ):
        pass
    assert message in str(caught.value)
    assert state() == before


def test_an_adapter_that_is_none(repository: Callable[..., None]) -> None:
    repository(ours_ops=UNKNOWN, ours_model=CALLS)
    model = importlib.import_module("ours_model").Model("function")
    given = {"ours_ops:my_scan": lambda *tensors, **named: np.zeros(3)}
    with qm.public_code(model, given), pytest.raises(UnsupportedScanError, match="returned a ndarray"):
        model(X)
    wrong: dict[str, Any] = {"ours_ops:my_scan": 3}
    with pytest.raises(UnknownNameError, match="takes the same arguments"), qm.public_code(scans=wrong):
        pass


def test_models_that_are_in_no_module(repository: Callable[..., None]) -> None:
    """A file that was loaded by its path need not be in sys.modules; its functions know their globals."""
    space: dict[str, Any] = {"__name__": "nowhere_to_be_found"}
    exec(
        LOOP
        + MODEL.format(package="os", scan="path")
        .replace("path", "selective_scan_ref")
        .replace("from os import selective_scan_ref", ""),
        space,
    )
    model = space["Model"]()
    assert "nowhere_to_be_found" not in sys.modules
    with qm.public_code(model), torch.no_grad():
        assert error(model(X), expected(model)) <= TOLERANCE


def test_redirected_functions_hold_nothing_alive(repository: Callable[..., None]) -> None:
    from quartermap_deploy.sources.public_code import redirect

    repository(ours_ops=LOOP, ours_model=MODEL.format(package="ours_ops", scan="selective_scan_ref"))
    model = made("ours_model")
    gc.collect()
    before = len(redirect._targets)
    for _ in range(3):
        with qm.public_code(model):
            assert len(redirect._targets) > before
    gc.collect()
    assert len(redirect._targets) == before


def test_as_a_decorator() -> None:
    @qm.public_code()
    def load() -> types.ModuleType:
        return importlib.import_module("selective_scan")

    assert load().selective_scan_fn(X, X, -torch.ones(4, 2), X[:, :2], X[:, :2]).shape == X.shape
    assert "selective_scan" not in sys.modules
