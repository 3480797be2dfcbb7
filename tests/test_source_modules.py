"""Source models of modules that are not ours: what one run shows, and what is refused before any export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quartermap_deploy as qm
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import ExportError, InputError, PlanError, UnknownNameError
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.sources import discovery
from quartermap_deploy.sources.modules import _inputs, module_source
from quartermap_deploy.validation.given import as_reference


class Scan(nn.Module):
    """A scan of a sequence (batch, L, channels), in one direction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(channels, 2) - 0.5)
        self.project = nn.Linear(channels, channels + 4)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        delta, B, C = self.project(x).transpose(1, 2).split([channels, 2, 2], dim=1)
        return qm.selective_scan(x.transpose(1, 2), delta, self.A, B, C, delta_softplus=True).transpose(1, 2)


class Spelling(nn.Module):
    """A scan that lies in a module without parameters."""

    def forward(self, scan: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = scan(x)
        return out


class Network(nn.Module):
    """Two stages of scans; the first stage's module is called for each input."""

    def __init__(self, what: str = "tensor") -> None:
        super().__init__()
        self.encoder, self.deep, self.again = Scan(4), Scan(4), Scan(4)
        self.what, self.calls = what, 0

    def forward(self, first: Tensor, second: Tensor | None = None) -> Any:
        x = self.encoder(first)
        y = x if second is None else self.encoder(second)
        z = self.again(self.deep(x[:, ::2]))
        outputs = {
            "tensor": z,
            "list": [x, z],
            "dict": {"logits": z.mean(1), "maps": (x, y)},
            "named": Named(x, z),
            "none": (z, None),
            "number": (z, 3),
            "nothing": None,
            "logits": z.mean(1),
            "double": z.double(),
            "changing": z,
        }
        self.calls += 1
        if self.what == "changing":
            first.mul_(2)
        if self.what == "noisy":
            return z + torch.rand_like(z)
        if self.what == "counting":
            return z + self.calls
        if self.what == "failing":
            raise RuntimeError("no such path")
        return outputs[self.what]


class Named(NamedTuple):
    """Two outputs with names."""

    fine: Tensor
    coarse: Tensor


def source(what: str = "tensor", example: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    example = torch.randn(2, 6, 4) if example is None else example
    return module_source(Network(what), example, **options)


def test_blocks_are_modules_and_calls_are_counted() -> None:
    found = source(example=(torch.randn(2, 6, 4), torch.randn(2, 6, 4)))
    assert [(b.index, b.stage, b.path, b.calls) for b in found.blocks] == [
        (1, 1, "encoder", 2),
        (2, 2, "deep", 1),
        (3, 2, "again", 1),
    ]
    names = [site.name for site in found.discovery.sites]
    assert names == ["block_1/scan", "block_1/call_2/scan", "block_2/scan", "block_3/scan"]
    assert found.depths == (1, 2) and found.kind == "module"
    assert found.selected(QuarterMap(every=1)) == (2, 3)


@pytest.mark.parametrize(
    ("lengths", "stages"),
    [
        ([576, 576, 144, 144, 36], [1, 1, 2, 2, 3]),
        ([64, 16, 16, 64], [1, 2, 2, 3]),  # up again
        (
            [784, 576, 196, 144, 196],
            [1, 1, 2, 2, 2],
        ),  # windows of 7 and of 6 in maps that are padded for them
        ([196, 197], [1, 1]),
        ([9, 4], [1, 2]),
    ],
)
def test_stages_are_told_apart_by_the_length_of_their_scans(lengths: list[int], stages: list[int]) -> None:
    assert discovery._stages(lengths) == stages


def test_stages_can_be_given() -> None:
    assert source(stages=[2, 1]).depths == (2, 1)
    with pytest.raises(
        InputError, match=r"stages = \[5\] are for 5 blocks, but the modules that call scans are 3"
    ):
        source(stages=[5])


def test_the_users_module_is_not_changed() -> None:
    model = Network().double().train()
    module_source(model, torch.randn(2, 6, 4))
    assert model.training and next(model.parameters()).dtype == torch.float64 and model.calls == 0


@pytest.mark.parametrize(
    ("what", "task", "names"),
    [
        ("tensor", "other", ["output"]),
        ("logits", "classification", ["logits"]),
        ("list", "other", ["output_0", "output_1"]),
        ("dict", "other", ["logits", "maps_0", "maps_1"]),
        ("named", "other", ["fine", "coarse"]),
        ("none", "other", ["output_0"]),
    ],
)
def test_outputs_get_names(what: str, task: str, names: list[str]) -> None:
    found = source(what)
    assert found.task == task and list(found.discovery.outputs) == names


def test_an_output_is_not_called_like_an_input() -> None:
    class Restorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scan = Scan(4)

        def forward(self, image: Tensor) -> Tensor:
            x = image.flatten(2).transpose(1, 2)
            return (x + self.scan(x)).transpose(1, 2).view_as(image)

    picture = torch.randn(1, 4, 3, 5)
    for task in ("image", None):
        assert list(module_source(Restorer(), picture, task=task).discovery.outputs) == ["image_output"]


def test_a_given_task_names_the_outputs() -> None:
    assert list(source("list", task="features").discovery.outputs) == ["features_0", "features_1"]


def test_inputs_by_keyword_and_by_position() -> None:
    example = {"second": torch.randn(3, 6, 4), "first": torch.randn(3, 6, 4)}
    by_keyword = source(example=example)
    assert [item.name for item in by_keyword.inputs] == ["second", "first"]
    assert by_keyword.signature.by_keyword
    by_position = source(example=(torch.randn(1, 6, 4), torch.randn(1, 6, 4)))
    assert [item.name for item in by_position.inputs] == ["first", "second"]
    assert by_position.inputs[0].shape == ("batch", 6, 4)
    assert source(dynamic_batch=False).inputs[0].shape == (2, 6, 4)


def test_axes_of_one_name_have_one_size() -> None:
    example = {"first": torch.randn(2, 6, 4), "second": torch.randn(2, 6, 4)}
    assert [item.shape for item in source(example=example, dynamic_size=True).inputs] == [("batch", 6, 4)] * 2
    images = {"a": np.zeros((1, 3, 8, 8)), "b": np.zeros((1, 3, 8, 8)), "c": np.zeros((1, 1, 4, 4))}
    shapes = [item.shape[2:] for item in _inputs(images, True, True)]
    assert shapes == [("height", "width"), ("height", "width"), ("c_height", "c_width")]


def test_arrays_and_other_types_become_float32() -> None:
    found = source(example=np.zeros((1, 6, 4), np.float64))
    assert found.example["first"].dtype == np.float32


@pytest.mark.parametrize(
    ("what", "example", "options", "error", "message"),
    [
        (
            "failing",
            None,
            {},
            ExportError,
            "fails on its example inputs.*RuntimeError: no such path.*--example",
        ),
        ("tensor", torch.randn(2, 4), {}, ExportError, r"fails on its example inputs \(first \(2, 4\)"),
        ("tensor", torch.randn(2, 6, 5), {}, ExportError, "fails on its example inputs"),
        ("noisy", None, {}, ExportError, "draws random numbers.*gives another 'output' at every call"),
        ("counting", None, {}, ExportError, "gives another 'output' at every call"),
        ("changing", None, {}, ExportError, r"changes its input 'first' in place.*first = first\.clone\(\)"),
        ("tensor", torch.full((2, 6, 4), torch.nan), {}, InputError, "'output' with NaN or infinite values"),
        ("double", None, {}, InputError, r"returns 'output' in float64; expected float32.*\.float\(\)"),
        ("number", None, {}, InputError, "returns a int as 'output_1'; expected tensors"),
        ("nothing", None, {}, InputError, "returns no tensor"),
        ("tensor", [], {}, InputError, "no example inputs"),
        ("tensor", (torch.randn(2, 6, 4), "x"), {}, InputError, "'second' is a str; expected a tensor"),
        ("tensor", torch.zeros(0, 6, 4), {}, InputError, "is empty"),
        ("tensor", None, {"task": "detection"}, UnknownNameError, "task"),
        ("logits", None, {"labels": ["a"]}, InputError, "1 labels, but the output 'logits' has 4 classes"),
        ("tensor", None, {"labels": ["a"]}, InputError, "the task is 'other'"),
    ],
)
def test_what_cannot_be_compiled_is_told_before_any_work(
    what: str, example: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        source(what, example, **options)


def test_a_preprocessing_needs_an_image() -> None:
    preprocessing = Preprocessing((8, 8), "stretch", (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(InputError, match="no input can hold one"):
        source(preprocessing=preprocessing)


def test_a_module_without_a_scan_is_told_what_to_do() -> None:
    with pytest.raises(ExportError, match=r"makes no selective scan.*scans=.*torch\.onnx\.export"):
        module_source(nn.Linear(4, 4), torch.zeros(1, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_told_as_such() -> None:
    with pytest.raises(InputError, match="TorchScript"):
        module_source(torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_what_is_around_a_module_is_taken_off(wrap: Any) -> None:
    found = module_source(wrap(Network()), torch.randn(2, 6, 4))
    assert found.name == "Network" and type(found.module) is Network


def test_a_module_without_values_is_refused() -> None:
    with pytest.raises(ExportError, match=r"meta device, where encoder\.A has no values"):
        module_source(Network().to("meta"), torch.randn(2, 6, 4))


def test_bfloat16_becomes_float32() -> None:
    found = module_source(Network().bfloat16(), torch.ones(2, 6, 4, dtype=torch.bfloat16))
    assert found.example["first"].dtype == np.float32
    assert {parameter.dtype for parameter in found.module.parameters()} == {torch.float32}


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"a str is no torch\.nn\.Module"):
        module_source("model.pth", torch.zeros(1, 4))  # type: ignore[arg-type]


def test_the_reference_shows_scans_and_blocks_and_follows() -> None:
    found = source(example=(torch.randn(2, 6, 4), torch.randn(2, 6, 4)))
    reference = found.reference(None)
    feeds = found.example
    parts = reference.run_parts(feeds)
    names = ["block_1", "block_1/call_2", "block_2", "block_3"]
    assert list(parts) == [part for name in names for part in (f"{name}/scan", name)]
    with torch.no_grad():
        expected = found.module(*(torch.from_numpy(array) for array in feeds.values())).numpy()
    np.testing.assert_allclose(reference.run(feeds)["output"], expected, rtol=1e-5, atol=1e-6)
    followed = reference.run_parts(feeds, {"block_2": np.zeros_like(parts["block_2"])})
    assert np.abs(followed["block_3"] - parts["block_3"]).max() > 1e-3
    np.testing.assert_allclose(followed["block_2"], parts["block_2"], atol=1e-5)


def test_a_scan_of_unknown_order_is_not_pruned() -> None:
    found = source()
    with pytest.raises(PlanError, match="the order of block_2/scan is unknown"):
        found.reference(QuarterMap(blocks=(2,))).run(found.example)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.zeros(2, 6, 4), r"is a Tensor; expected \(inputs, outputs\), or the path"),
        ((torch.zeros(2, 6, 4),) * 3, "is 3 values; expected"),
        ((torch.full((2, 6, 4), torch.nan), torch.zeros(2, 3, 4)), "NaN or infinite values in 'first'"),
        ((torch.zeros(2, 6, 4), torch.full((2, 3, 4), torch.inf)), "NaN or infinite values in 'output'"),
        ("none.npz", r"none\.npz cannot be read"),
    ],
)
def test_a_reference_that_is_none_is_refused(reference: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_reference(source(), reference)


def test_a_reference_is_two_nests_of_tensors_or_a_file(tmp_path: Path) -> None:
    x, y = torch.ones(2, 6, 4), torch.ones(2, 3, 4)
    np.savez(tmp_path / "saved.npz", first=x.numpy(), output=y.numpy())
    for reference in (
        (x, y),
        [{"first": x}, {"output": y}],
        tmp_path / "saved.npz",
        str(tmp_path / "saved.npz"),
    ):
        found = as_reference(source(), reference)
        assert list(found.inputs) == ["first"] and list(found.outputs) == ["output"]
