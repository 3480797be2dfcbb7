"""Modules that are not ours, through the whole pipeline: the spellings of public families, and the examples.

Each is traced once; from the trace come the unpruned graph and the pruned one, and each is compared with PyTorch at
every scan, every block and every output.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from spellings import SPELLINGS

import quartermap_deploy as qm
from quartermap_deploy.compiling.cases import validation_cases
from quartermap_deploy.compiling.parity import parity_of
from quartermap_deploy.errors import ExportError, ParityError, PassError
from quartermap_deploy.exporting.export import Export, export
from quartermap_deploy.lowering.operator import SELECTIVE_SCAN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes.recover_2d import RecoveryReport
from quartermap_deploy.pruning import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.sources.modules import ModuleSource, module_source

EXAMPLES = Path(__file__).parent.parent / "examples"
TOLERANCE = 1e-5
"""Of the largest value of every scan, block and output; what the issue of these modules asks for."""

REFUSED = {
    "vmamba_v05_cascade": "in which order its steps visit the positions of a map is not known",
    "localmamba": "windows or another order",
    "localmamba_wide": "windows or another order",
    "efficientvmamba": "scan parts of the map, 24 of 96 positions",
    "efficientvmamba_wide": "scan parts of the map, 24 of 96 positions",
    "changemamba": r"block 3 \(columns\).*several images or maps lie in the map",
    "mambavision": "cannot be pruned",
}
"""Spellings of which not every block can be pruned, and a part of the reason."""
BLOCKS = {"changemamba": (1, 2)}
"""The blocks of these that can."""

UNSUNK = {"mamba_unet": "is read by", "localmamba_gates": ""}
"""Spellings in which the map is restored right behind the scan, as a norm or a gate takes all positions together."""


def source_of(name: str) -> ModuleSource:
    spelling = SPELLINGS[name]
    example = spelling.examples()
    return module_source(spelling.make(), example if len(example) > 1 else example[0], name=name)


def require_parity(source: ModuleSource, exported: Export, plan: QuarterMap | None) -> None:
    recipe = Recipe(source.name, quartermap=plan)
    graph = exported.model.SerializeToString()
    report = parity_of(recipe, source, validation_cases(recipe, source), graph, exported.traced)
    assert report.passed, report.describe_failure()
    assert report.worst <= TOLERANCE
    judged = {output.name for outputs in report.cases.values() for output in outputs}
    assert {f"block_{block.index}/scan" for block in source.blocks} <= {n.removesuffix("/1") for n in judged}


REPEATED = ("vmamba_v05_channel_last", "vmamba_backbone", "localmamba", "efficientvmamba")
"""Spellings that others show too: the other layout, more outputs, and two that differ from wide ones in their width
alone, which the tests of `recover_apart` vary on small modules."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.exhaustive if n in REPEATED else ()) for n in SPELLINGS],
)
def test_a_spelling_compiles_pruned_and_not(name: str) -> None:
    spelling, source = SPELLINGS[name], source_of(name)
    assert len(source.discovery.sites) == spelling.scans
    traced = source.trace()
    (report,) = traced.reports
    assert isinstance(report, RecoveryReport)
    recovered = [scan for found in report.scans if found.refused is None for scan in found.scans]
    assert len(recovered) == spelling.maps
    unpruned = export(source, None, traced=traced)
    operators = [node.op_type for node in unpruned.model.graph.node]
    assert not {"Loop", "Scan", "If"} & set(operators)
    assert SELECTIVE_SCAN not in operators if spelling.maps == spelling.scans else True
    require_parity(source, unpruned, None)

    everything = QuarterMap(every=1, exclude_stages=())
    if name in REFUSED:
        with pytest.raises(PassError, match=REFUSED[name]):
            export(source, everything, traced=traced)
        if name not in BLOCKS:
            return
    blocks = BLOCKS.get(name, tuple(block.index for block in source.blocks))
    plan = QuarterMap(blocks=blocks)
    pruned = export(source, plan, traced=traced)
    require_parity(source, pruned, plan)
    names = [report.name for report in pruned.passes]
    assert names == ["recover_2d", "insert_quartermap", "hoist_slice", "sink_resize"]
    if spelling.maps == spelling.scans:
        assert SELECTIVE_SCAN_2D in operators
        inserted, hoisted, sunk = (len(report.changed) for report in pruned.passes[1:])
        calls = sum(block.calls for block in source.blocks if block.index in blocks)
        assert (inserted, hoisted) == (len(blocks), calls)
        if name in UNSUNK:
            assert sunk == 0 and all(UNSUNK[name] in why for why in pruned.passes[3].refused.values())
        else:
            assert sunk == calls, pruned.passes[3].refused


def compiled(example: str, out: Path, *options: object) -> dict[str, Any]:
    done = call("compile", f"{EXAMPLES / example}", *options, "--out", out, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_the_u_net_of_the_documents(tmp_path: Path) -> None:
    options = ("--example", "1x3x64x96", "--arg", "classes=4", "--task", "segmentation", "--every", "2")
    compiled("unet.py:UNet", tmp_path / "unet", *options)
    bundle = qm.load_bundle(tmp_path / "unet")
    blocks = bundle.manifest["blocks"]
    assert [block["path"] for block in blocks] == [
        f"{path}.mixer" for path in ("fine.0", "fine.1", "coarse.0", "coarse.1", "decoder")
    ]
    assert [block["stage"] for block in blocks] == [1, 1, 2, 2, 3]
    assert [block["index"] for block in blocks if block["pruned"]] == [4]
    assert (bundle.task, bundle.num_classes, bundle.preprocessing) == ("segmentation", 4, None)
    assert bundle.manifest["recipe"]["module"]["factory"] == "unet.py:UNet"
    assert bundle.report["given_reference"] is None
    logits = bundle.run(np.zeros((3, 3, 64, 96), np.float32))
    assert isinstance(logits, np.ndarray) and logits.shape == (3, 4, 64, 96)
    again = call("validate", bundle.path, "--reference", "torch", "--factory", f"{EXAMPLES / 'unet.py'}:UNet")
    assert again.code == 0, again.err
    refused = call("validate", bundle.path, "--reference", "torch")
    assert refused.code == 2 and "is run only if you name it" in refused.err


TOKENS = """
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.step = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4)
        self.A, self.out = torch.nn.Parameter(torch.rand(4, 2)), torch.nn.Linear(4, 3)

    def forward(self, ids):
        x = self.embed(ids)
        u, delta = x.transpose(1, 2), self.step(x).transpose(1, 2)
        y = selective_scan_fn(u, delta, -self.A, u[:, :2], u[:, 2:], delta_softplus=True)
        return self.out(y.mean(2))
"""


def test_inputs_of_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "tokens.py").write_text(TOKENS)
    factory = f"{tmp_path / 'tokens.py'}:Tokens"
    done = call("compile", factory, "--example", "ids=1x5:int64", "--out", tmp_path / "tokens")
    assert done.code == 0, done.err
    bundle = qm.load_bundle(tmp_path / "tokens")
    assert [(item.name, item.shape[1:], item.type) for item in bundle.inputs] == [("ids", (5,), "int64")]
    assert bundle.manifest["recipe"]["module"]["types"] == {"ids": "int64"}
    found = bundle.run(np.array([[0, 6, 3, 1, 5]], np.int64))
    assert isinstance(found, np.ndarray) and found.shape == (1, 3)
    again = call("validate", bundle.path, "--reference", "torch", "--factory", factory)
    assert again.code == 0, again.err


def test_a_given_reference_is_compared(tmp_path: Path) -> None:
    """Tensors that the module made elsewhere; here it is itself that makes them, right ones and wrong ones."""
    spelling = SPELLINGS["vmamba_v0"]
    model, images = spelling.make(), spelling.examples()[0]
    with torch.no_grad(), qm.public_code(model):
        logits = model(images)
    with pytest.raises(ParityError, match="departs from the given reference at 'logits'"):
        qm.compile_module(model, images, tmp_path / "wrong", reference=(images, logits * 1.01))
    assert list(tmp_path.iterdir()) == []
    np.savez(tmp_path / "golden.npz", x=images.numpy(), logits=logits.numpy())
    bundle = qm.compile_module(model, images, tmp_path / "right", reference=(images, {"logits": logits}))
    given = bundle.report["given_reference"]
    assert given["passed"] and given["outputs"][0]["relative_error"] < 1e-5


class Halving(torch.nn.Module):
    """Makes a number of its batch, as MambaVision's windows do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SPELLINGS["vmamba_v0"].make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y.reshape(int(y.shape[0] / 1), -1)


def test_a_batch_that_is_made_a_number_is_found(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"batch.*(//|fix the batch|specialized|2)"):
        qm.compile_module(Halving(), torch.randn(2, 3, 16, 24), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def mistake(*arguments: object) -> str:
    done = call("compile", *arguments)
    assert done.code == 2, done.out
    assert done.out == "" and len(re.findall("error:", done.err)) == 1
    return done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unet.py:UNet",), "there is no example input"),
        (("unet.py:Unet", "--example", "1x3x64x96"), "has no 'Unet'; did you mean UNet"),
        (("nothing.py:Net", "--example", "1x3x64x96"), "there is no file"),
        (("unet.py:UNet", "--example", "1x3x64"), "fails on its example inputs"),
        (("unet.py:UNet", "--example", "1x1x64x96"), "fails on its example inputs"),
        (("unet.py:UNet", "--example", "1x3xax96"), "is no example input"),
        (
            ("unet.py:UNet", "--example", "1x3x64x96:float64"),
            "has the element type 'float64'; expected one of",
        ),
        (("unet.py:UNet", "--example", "1x3x64x96:int64"), "fails on its example inputs"),
        (("unet.py:UNet", "--example", "a=1x3x64x96", "--example", "b=1x3x64x96"), "has no input 'a'"),
        (("unet.py:UNet", "--example", "1x3x64x96", "--arg", "depth=3"), "it takes"),
        (
            ("unet.py:UNet", "--example", "1x3x64x96", "--num-classes", "3"),
            "num_classes is for models of cards",
        ),
        (("unet.py:UNet", "--example", "1x3x64x96", "--weights", "none.pth"), r"none\.pth"),
        (("unet.py:UNet", "--example", "1x3x64x96", "--every", "9"), "prunes nothing"),
        (
            ("unet.py:UNet", "--example", "1x3x64x96", "--stages", "1,1"),
            "are for 2 blocks",
        ),
        (("unet.py:UNet", "--example", "1x3x64x96", "--preprocessing", "mean=0,0,0"), "no std"),
        (("unet.py:UNet", "--example", "1x3x64x96", "--labels", "digits"), "10"),
    ],
)
def test_mistakes_are_told_and_write_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    source, *options = arguments
    said = mistake(EXAMPLES / source, *options, "--out", tmp_path / "out")
    assert re.search(message, " ".join(said.split())), said
    assert list(tmp_path.iterdir()) == []


def test_options_of_modules_are_for_modules() -> None:
    assert "is for a module of your own" in mistake("vmamba_digits", "--example", "1x3x64x64")
